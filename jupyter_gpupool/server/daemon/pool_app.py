"""A pool in a process of its own, on HTTP."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from typing import Any

from jupyter_core.application import JupyterApp
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from traitlets import Int, TraitError, Unicode

from jupyter_gpupool.client import discovery
from jupyter_gpupool.core.errors import NotLeading, PoolError
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.engines.ray.engine import RayEngine
from jupyter_gpupool.former_names import FormerNames
from jupyter_gpupool.server.access.authentication import TokenStore
from jupyter_gpupool.server.http.handlers import MAX_BODY, standalone_application
from jupyter_gpupool.server.http.metrics import METRICS, OpenMetrics, ServerFigures
from jupyter_gpupool.server.http.servers import SERVERS
from jupyter_gpupool.server.service import traces
from jupyter_gpupool.server.service.service import PoolService

#: The control port that Bitfusion's users know.
DEFAULT_PORT = 56001


class GPUPoolServer(FormerNames, JupyterApp):
    """Hosts the pool of this machine's GPUs until it receives a signal to end."""

    former_class = "PoolApp"

    name = "gpupool-server"
    description = "Serve this machine's GPUs as a pool."
    # One configuration file for the command and for the pool, whoever hosts it.
    config_file_name = Unicode("jupyter_gpupool_config")
    classes = [PoolService, LocalEngine, RayEngine]

    host = Unicode("127.0.0.1", help="Address to listen on.").tag(config=True)
    port = Int(DEFAULT_PORT, min=0, max=65535, help="Port to listen on; 0 takes a free one.").tag(config=True)
    starter_fd = Int(
        -1,
        help="A pipe of the process that started this pool: when that process has ended and no lease is left, the "
        "pool ends. -1: there is no such process.",
    ).tag(config=True)

    metrics_address = Unicode(
        help="ADDRESS:PORT, such as 127.0.0.1:56002, at which /metrics is served without a token. Default: "
        "nowhere; on the pool's own port, /metrics takes an administrator's token.",
    ).tag(config=True)

    otlp_endpoint = Unicode(
        help="Base URL of an OpenTelemetry receiver (OTLP over HTTP), such as http://127.0.0.1:4318; requests for "
        "slices are sent there as traces. Needs the extra `otel`. Default: OTEL_EXPORTER_OTLP_ENDPOINT.",
    ).tag(config=True)

    aliases = {"host": "GPUPoolServer.host", "port": "GPUPoolServer.port", "db-url": "PoolService.db_url"}
    flags = {
        "persistent": (
            {"LocalEngine": {"persistent": True}, "RayEngine": {"persistent": True}},
            "Leases continue while the pool restarts.",
        ),
        "emulate": (
            {"LocalEngine": {"emulate": "always"}, "RayEngine": {"emulate": "always"}},
            "Offer emulated GPUs, also on a machine with real ones.",
        ),
    }

    service_class: type[PoolService] = PoolService
    _server: HTTPServer | None = None
    figures: ServerFigures

    @classmethod
    def launch_instance(cls, argv: Any = None, **kwargs: Any) -> None:
        try:
            super().launch_instance(argv, **kwargs)
        except TraitError as e:  # of a part that is created after the configuration was read
            print(f"{cls.name}: the configuration is wrong: {e}", file=sys.stderr)
            sys.exit(1)

    def start(self) -> None:
        super().start()
        try:
            asyncio.run(self.serve())
        except PoolError as e:
            self.exit_with(str(e))
        except OSError as e:
            self.exit_with(f"cannot listen on {self.host}:{self.port}: {e.strerror or e}")

    def exit_with(self, line: str) -> None:
        print(f"gpupool server: {line}", file=sys.stderr)
        self.exit(1)

    async def serve(self) -> None:
        """Run until SIGTERM or SIGINT, or until nobody needs the pool any more."""
        self.prepare()
        self._be_quick()
        ephemeral = self.starter_fd >= 0
        sockets = bind_sockets(0 if ephemeral else self.port, self.host or None, socket.AF_UNSPEC)
        service = self.service_class(parent=self)
        service.address = self.own_address(sockets[0].getsockname()[1])
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, over.set)
        await service.start()
        try:
            self.figures = ServerFigures(service)
            self._open_metrics()
            service.listen(traces.begin(self.otlp_endpoint, self.log.warning).changed)
            await self.open(service, sockets)
            if ephemeral:
                asyncio.create_task(self._end_when_unneeded(service, over))
            await over.wait()
        finally:
            await self.close(service)
            await asyncio.to_thread(traces.end)

    def own_address(self, port: int) -> str:
        """Return the pool's URL."""
        return f"http://[{self.host}]:{port}" if ":" in self.host else f"http://{self.host}:{port}"

    def prepare(self) -> None:
        """Prepare what is needed before anything is opened: the pool before this one must have closed the ledger."""
        discovery.wait_for_ending(lambda pool: self.log.info("Waiting for pool process %d to end", pool.pid))

    def _be_quick(self) -> None:
        # By default, threads that wait for the network wait 5 ms more whenever the manager's thread runs.
        sys.setswitchinterval(0.0005)
        # Do not create log lines that no handler writes.
        taken = min((handler.level for handler in self.log.handlers), default=logging.WARNING)
        self.log.setLevel(max(taken, logging.DEBUG))
        # Thousands of leases live long. Collecting them and the modules again and again takes a fifth of the time,
        # and delays every answer.
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)

    async def open(self, service: PoolService, sockets: list[socket.socket]) -> None:
        """Accept clients."""
        token = discovery.user_token()
        self._server = HTTPServer(
            standalone_application(
                service,
                TokenStore(token),
                SERVERS,
                beside=METRICS,
                log_function=self.answered,
                figures=self.figures,
            ),
            max_body_size=4 * MAX_BODY,
            max_header_size=16 * 1024,
        )
        self._server.add_sockets(sockets)
        address = self.own_address(sockets[0].getsockname()[1])
        discovery.publish(address, token)
        self.log.info("GPU pool on %s (process %d)", address, os.getpid())

    def answered(self, handler: Any) -> None:
        """Count and log an answered request."""
        self.figures.answered(handler)
        self._log_request(handler)

    def _open_metrics(self) -> None:
        if not self.metrics_address:
            return
        host, _, port = self.metrics_address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit():
            raise PoolError(
                f"metrics_address must be ADDRESS:PORT, such as 127.0.0.1:56002, not {self.metrics_address}"
            )
        application = Application(
            [("/metrics", OpenMetrics)], figures=self.figures, log_function=lambda handler: None
        )
        try:
            application.listen(int(port), host.strip("[]"), max_body_size=1024)
        except (OSError, OverflowError) as e:
            raise PoolError(f"cannot serve /metrics at {self.metrics_address}: {e}") from None
        self.log.info("Metrics, without a token, on http://%s/metrics", self.metrics_address)

    async def close(self, service: PoolService) -> None:
        """Accept no more clients, and stop the service."""
        discovery.announce_end()
        if self._server is not None:
            self._server.stop()
        await service.stop()
        if self._server is not None:
            await self._server.close_all_connections()
        discovery.withdraw()

    async def _end_when_unneeded(self, service: PoolService, over: asyncio.Event) -> None:
        gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.starter_fd, gone.set)
        await gone.wait()
        loop.remove_reader(self.starter_fd)
        while not await service.idle():
            await asyncio.sleep(0.1)
        discovery.announce_end()
        service.refuse_requests()  # of clients that found this pool before
        while not await service.idle():
            await asyncio.sleep(0.1)
        over.set()

    @staticmethod
    def failed(handler: Any) -> bool:
        """Return whether a request met an error here; one that another server leads is sent on, which is none."""
        return handler.get_status() >= 500 and getattr(handler, "refusal", "") != NotLeading.__name__

    def _log_request(self, handler: Any) -> None:
        if self.failed(handler):
            self.log.error("%d %s", handler.get_status(), handler._request_summary())
        else:
            self.log.debug("%d %s", handler.get_status(), handler._request_summary())


main = GPUPoolServer.launch_instance

if __name__ == "__main__":
    main()
