"""Stands for a single-user server where Jupyter's own would take too long to start: it answers the hub, and no more."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"{}"  # who asks is not checked, so nothing is said
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-JupyterHub-Version", os.environ.get("JUPYTERHUB_VERSION", ""))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    url = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])
    server = ThreadingHTTPServer((url.hostname or "127.0.0.1", url.port or 0), Answers)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    if os.environ.get("LIGHT_TAKES"):
        from jupyter_gpupool.hub.single_user import HubServer

        held = HubServer(lambda line: print(line, file=sys.stderr))
        asyncio.run(held.start())
    server.serve_forever()


main()
