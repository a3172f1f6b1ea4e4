"""The hub's service: one pool for all users. The hub starts it, or it runs elsewhere with the same environment."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from jupyterhub.services.auth import HubOAuth
from tornado.httpserver import HTTPServer
from tornado.web import Application
from traitlets import Bool, Unicode

from jupyter_gpupool.core.errors import InvalidRequest, PoolError
from jupyter_gpupool.server.access.open_calls import OpenCallLimits
from jupyter_gpupool.server.access.rates import RateLimits
from jupyter_gpupool.server.daemon.https import Certificate
from jupyter_gpupool.server.daemon.pool_app import GPUPoolServer
from jupyter_gpupool.server.http.handlers import MAX_BODY
from jupyter_gpupool.server.service.service import PoolService

from .handlers import hub_handlers
from .identity import FRESH_S, HubTokens
from .pool import HubPool
from .user_servers import Servers

#: How long to wait for a predecessor to release its address and its ledger, in seconds.
_HANDOVER_S = 15.0


class GPUPoolHubService(GPUPoolServer):
    """Serves the pool behind a hub's login. JupyterHub's own environment variables say where the hub is."""

    former_class = "HubService"
    former_traits = {"managed": "exit_with_parent"}

    name = "gpupool-hub"
    description = "Lend this machine's GPUs to the users of a JupyterHub."

    directory = Unicode("gpupool", help="Folder for the ledger and the list of servers with GPUs.").tag(
        config=True
    )
    certfile = Unicode(help="Certificate (PEM), for HTTPS and for the data port. Default: none.").tag(
        config=True
    )
    keyfile = Unicode(help="Its private key (PEM).").tag(config=True)
    ca_file = Unicode(help="Not used any more: workers have certificates of their own.").tag(config=True)
    exit_with_parent = Bool(True, help="Whether to exit when the process that started this one exits.").tag(
        config=True
    )

    service_class = HubPool
    flags = {
        **GPUPoolServer.flags,
        "unmanaged": (
            {"GPUPoolHubService": {"exit_with_parent": False}},
            "Keep running when the hub exits.",
        ),
    }

    def prepare(self) -> None:
        """Read JupyterHub's variables. Raises InvalidRequest if one is missing."""
        try:
            self._token = os.environ["JUPYTERHUB_API_TOKEN"]
            self._prefix = os.environ["JUPYTERHUB_SERVICE_PREFIX"]
            self._api = os.environ["JUPYTERHUB_API_URL"].rstrip("/")
            url = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])
        except KeyError as e:
            raise InvalidRequest(
                f"{e.args[0]} is not set; let JupyterHub start this service, or see docs/how-to/jupyterhub.md"
            ) from None
        self.port = url.port or self.port
        # The name in the address may be that of a proxy or of a cluster's service: then listen on all addresses.
        near = url.hostname in ("127.0.0.1", "localhost", "::1")
        self.host = url.hostname or "" if near else ""
        folder = Path(self.directory)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = self.config.LocalEngine
        engine.setdefault("run_dir", str(folder / "run"))
        engine.setdefault("persistent", True)
        # The first holder is this process, which may be busy when many servers start at once.
        engine.setdefault("attach_timeout_s", 60.0)
        if self.certfile:
            engine.setdefault("certfile", self.certfile)
            engine.setdefault("host", url.hostname or "127.0.0.1")
        self.config.PoolService.setdefault("db_url", f"sqlite:///{folder.resolve() / 'ledger.sqlite'}")

    async def serve(self) -> None:
        """Serve the pool; first wait for a predecessor that still has the address or the ledger."""
        self._parent = os.getppid()
        deadline = time.monotonic() + _HANDOVER_S
        while True:
            try:
                await super().serve()
                return
            except (PoolError, OSError):
                # The service of a hub that was killed exits a moment after it.
                if time.monotonic() > deadline or self._server is not None:
                    raise
            await asyncio.sleep(0.2)

    async def open(self, service: PoolService, sockets: list[socket.socket]) -> None:
        assert isinstance(service, HubPool)
        auth = HubOAuth.instance(config=self.config, cache_max_age=int(FRESH_S))

        async def who(token: str) -> Any:
            # HubTokens caches the answers itself.
            return await auth.user_for_token(token, use_cache=False, sync=False)

        said = json.loads(os.environ.get("GPUPOOL_HUB_NAMESPACES") or "null")
        tokens = HubTokens(self._token, who, said, service.belongs)
        certificate = Certificate(self.certfile, self.keyfile) if self.certfile else None
        self._servers = Servers(
            service, Path(self.directory) / "servers.json", self._runs, secure=bool(certificate)
        )
        await self._servers.start()
        application = Application(
            hub_handlers(self._prefix, service, tokens, self._servers),
            log_function=self._log_request,
            cookie_secret=secrets.token_bytes(32),
            websocket_max_message_size=4096,
            rate_limits=RateLimits(parent=self),
            open_calls=OpenCallLimits(parent=self),
        )
        self._server = HTTPServer(
            application,
            ssl_options=certificate.context if certificate else None,
            max_body_size=4 * MAX_BODY,
            max_header_size=32 * 1024,
            xheaders=True,
        )
        self._server.add_sockets(sockets)
        self._hub = httpx.AsyncClient(
            headers={"Authorization": f"token {self._token}"}, trust_env=False, timeout=10
        )
        if self.exit_with_parent:
            self._orphaned = asyncio.create_task(self._end_with_the_hub())
        self.log.info("GPU pool of the hub on port %d (process %d)", sockets[0].getsockname()[1], os.getpid())

    async def close(self, service: PoolService) -> None:
        if self._server is not None:
            self._server.stop()
            await self._servers.stop()
            await self._hub.aclose()
        await service.stop()
        if self._server is not None:
            await self._server.close_all_connections()

    async def _end_with_the_hub(self) -> None:
        while os.getppid() == self._parent:
            await asyncio.sleep(0.5)
        self.log.info("The hub has exited; exiting too")
        os.kill(os.getpid(), signal.SIGTERM)

    async def _runs(self, user: str, server: str) -> bool:
        """Return whether a user's server runs. Raises OSError if the hub does not answer."""
        try:
            answer = await self._hub.get(f"{self._api}/users/{quote(user, safe='')}")
        except httpx.HTTPError as e:
            raise OSError(str(e)) from None
        if answer.status_code == 404:
            return False
        if answer.status_code != 200:
            raise OSError(f"the hub answered with status {answer.status_code}")
        return server in answer.json().get("servers", {})


main = GPUPoolHubService.launch_instance

if __name__ == "__main__":
    main()
