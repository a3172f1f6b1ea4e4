"""The pool as a daemon for many: control over HTTPS, data over TLS, and callers with tokens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from traitlets import Enum, List, Unicode, default

from jupyter_gpupool.client import bundle
from jupyter_gpupool.core.durations import format_time
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.engines.ray.engine import RayEngine
from jupyter_gpupool.pool.tenancy.tokens import Token
from jupyter_gpupool.server.access.authentication import Authenticator
from jupyter_gpupool.server.access.oidc.browser_sessions import ConsoleSessions
from jupyter_gpupool.server.access.oidc.issuers import Issuer
from jupyter_gpupool.server.access.oidc.settings import OIDC
from jupyter_gpupool.server.access.open_calls import OpenCallLimits
from jupyter_gpupool.server.access.rates import RateLimits
from jupyter_gpupool.server.access.token_service import Administration
from jupyter_gpupool.server.http.console import console_handlers
from jupyter_gpupool.server.http.handlers import MAX_BODY, standalone_application
from jupyter_gpupool.server.http.login import login_routes
from jupyter_gpupool.server.http.metrics import METRICS
from jupyter_gpupool.server.http.servers import SERVERS
from jupyter_gpupool.server.http.sign_in import session_routes, sign_in_handlers
from jupyter_gpupool.server.http.tokens import token_routes
from jupyter_gpupool.server.service.service import PoolService

from . import directory as folder
from . import json_logs
from .https import Certificate, SecureServer
from .pool_app import GPUPoolServer

#: How often the certificate's files are looked at, in seconds.
_CERTIFICATE_CHECK_INTERVAL_S = 5.0
#: How long a connection of somebody who is known may lie idle, in seconds; heartbeats come every few.
_IDLE_S = 300.0
#: What this process has open besides connections, at most: the ledger, and two files for each worker.
_OTHER_FILES = 512


class GPUPoolDaemon(GPUPoolServer):
    """Hosts the pool of a directory that `gpupool server init` wrote."""

    former_class = "Daemon"
    classes = [*GPUPoolServer.classes, RateLimits, OpenCallLimits, OIDC]
    former_traits = {"log_lines": "log_style"}

    directory = Unicode(help="The directory of this server.").tag(config=True)
    addresses = List(
        Unicode(), help="Names and addresses that clients know this server by; new bundles carry them."
    ).tag(config=True)
    host = Unicode("", help="Address that control listens on. Default: all of this machine.").tag(config=True)
    certfile = Unicode(help="This server's certificate (PEM).").tag(config=True)
    keyfile = Unicode(help="Its private key (PEM).").tag(config=True)
    ca_file = Unicode(help="The certificate of the authority that clients are to trust (PEM).").tag(
        config=True
    )
    log_style = Enum(["json", "text"], "json", help="Log lines for programs, or for people.").tag(config=True)

    @default("certfile")
    def _default_certfile(self) -> str:
        return str(Path(self.directory) / folder.SERVER_CERTIFICATE)

    @default("keyfile")
    def _default_keyfile(self) -> str:
        return str(Path(self.directory) / folder.SERVER_KEY)

    @default("ca_file")
    def _default_ca_file(self) -> str:
        return str(Path(self.directory) / folder.CA_CERTIFICATE)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tasks: list[asyncio.Task[None]] = []
        self._administration: Administration | None = None
        self._bound = self.port
        self._refusals = json_logs.Damper()

    def prepare(self) -> None:
        """Set the defaults that follow from the directory."""
        for name, value in (
            ("certfile", self.certfile),
            ("data_port", folder.DATA_PORT),
            ("host", self.addresses[0] if self.addresses else socket.gethostname()),
            ("run_dir", str(Path(self.directory) / "run")),
            ("environments_dir", str(Path(self.directory) / folder.ENVIRONMENTS)),
            ("persistent", True),
        ):
            self.config.LocalEngine.setdefault(name, value)
            if name in RayEngine.class_trait_names(config=True):
                self.config.RayEngine.setdefault(name, value)
        self.config.PoolService.setdefault("db_url", self._ledger_url())
        if self.log_style == "json":
            json_logs.use_json(self.log)
        # Every connection without TLS writes a line, and anybody can open thousands.
        logging.getLogger("tornado.general").addFilter(json_logs.Damper())
        import resource

        with contextlib.suppress(ValueError, OSError):
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        os.umask(0o077)  # the ledger, its journal, the workers' files: nobody else's to read

    def new_administrator(self) -> dict[str, str]:
        """Record a new administrator's token in this server's ledger. Return the bundle's files. Raises PoolError."""
        names = self.addresses or [socket.gethostname()]
        hosts = [bundle.with_port(name).rpartition(":")[0] for name in names]
        db_url = str(self.config.PoolService.get("db_url") or self._ledger_url())
        return folder.new_administrator(db_url, self._read_ca(), [f"{host}:{self.port}" for host in hosts])

    def own_address(self, port: int) -> str:
        name = bundle.with_port(self.addresses[0] if self.addresses else socket.gethostname())
        return f"https://{name.rpartition(':')[0]}:{port}"

    async def open(self, service: PoolService, sockets: list[socket.socket]) -> None:
        self._certificate = Certificate(self.certfile, self.keyfile)
        self._ca = self._read_ca()
        self._bound = sockets[0].getsockname()[1]
        self._administration = administration = Administration(service, self._bundle)
        await administration.start()
        settings = OIDC(parent=self)
        issuers = settings.parsed()
        authenticator = self._authenticator(administration, service, issuers)
        sessions = self._sessions(settings, issuers, authenticator)
        application = standalone_application(
            service,
            authenticator,
            [
                *SERVERS,
                *token_routes(administration),
                *login_routes(issuers),
                *(session_routes(sessions) if sessions else ()),
            ],
            beside=METRICS,
            log_function=self.answered,
            figures=self.figures,
            websocket_max_message_size=4096,
            admitted=lambda request: server.admit(request),
            rate_limits=RateLimits(parent=self),
            sessions=sessions,
            open_calls=OpenCallLimits(parent=self),
        )
        application.add_handlers(".*", console_handlers())
        if sessions is not None:
            known = {urlsplit(url).netloc: url for url in self._own_urls()}
            fixed = settings.console_address
            application.add_handlers(
                ".*",
                # Whoever sends the request chooses its Host header, so only a known one counts.
                sign_in_handlers(
                    sessions,
                    lambda request: fixed or known.get(request.host) or self.own_address(self._bound),
                ),
            )
        server: SecureServer = SecureServer(
            application,
            ssl_options=self._certificate.context,
            max_body_size=4 * MAX_BODY,
            max_header_size=16 * 1024,
            idle_connection_timeout=_IDLE_S,
            body_timeout=30.0,
            most=_connections(),
        )
        self._server = server
        server.add_sockets(sockets)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._tasks = [
            asyncio.create_task(server.turn_away_the_late()),
            asyncio.create_task(self._watch_certificate()),
        ]
        self.log.info(
            "GPU pool on HTTPS port %d and data port %d (process %d)",
            self._bound,
            service.engine.listens_on,
            os.getpid(),
            extra={
                "port": self._bound,
                "data_port": service.engine.listens_on,
                "pid": os.getpid(),
                "directory": self.directory,
            },
        )
        _notify(b"READY=1")

    async def close(self, service: PoolService) -> None:
        _notify(b"STOPPING=1")
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.stop()
        if self._administration is not None:
            await self._administration.stop()
        await service.stop()
        if self._server is not None:
            await self._server.close_all_connections()

    def _authenticator(
        self, administration: Administration, service: PoolService, issuers: Sequence[Issuer]
    ) -> Authenticator:
        """Return what authenticates callers: by the pool's own tokens, and by those of configured issuers."""
        if not issuers:
            return administration.authenticator
        from jupyter_gpupool.server.access.oidc.authenticator import AllTokens, IssuedTokens
        from jupyter_gpupool.server.access.oidc.keys import PublishedKeys

        try:
            keys = {issuer.issuer: PublishedKeys(issuer) for issuer in issuers}
        except OSError as e:
            raise PoolError(f"OIDC.issuers: a ca_file cannot be read ({e})") from None
        return AllTokens(
            administration.authenticator, IssuedTokens(issuers, keys, service.tenants.set_issued_roles)
        )

    def _sessions(
        self, settings: OIDC, issuers: Sequence[Issuer], authenticator: Authenticator
    ) -> ConsoleSessions | None:
        """Return the sign-ins of the Console, if an issuer has a client for it. Raises PoolError."""
        if not any(one.console_client_id for one in issuers):
            return None
        return ConsoleSessions(issuers, authenticator, settings.console_session_s)

    def _own_urls(self) -> list[str]:
        names = self.addresses or [socket.gethostname()]
        return [f"https://{bundle.with_port(a).rpartition(':')[0]}:{self._bound}" for a in names]

    def _ledger_url(self) -> str:
        return f"sqlite:///{Path(self.directory) / folder.LEDGER}"

    def _read_ca(self) -> str:
        try:
            return Path(self.ca_file).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise PoolError(f"cannot read {self.ca_file}: {getattr(e, 'strerror', None) or e}") from None

    def _bundle(self, token: Token, shown: str) -> dict[str, str]:
        until = f"until {format_time(token.expires_at)}" if token.expires_at is not None else "for good"
        addresses = [url.removeprefix("https://") for url in self._own_urls()]
        return bundle.files(self._ca, shown, f"Token {token.id} {until}: {token.description}", addresses)

    # -- certificates

    def _reload(self) -> None:
        try:
            self._certificate.reload()
            self._ca = self._read_ca()
        except PoolError as e:
            self.log.error("Kept the former certificate: %s", e)
        else:
            self.log.info("Read the certificate again", extra={"certfile": self.certfile})

    async def _watch_certificate(self) -> None:
        while True:
            await asyncio.sleep(_CERTIFICATE_CHECK_INTERVAL_S)
            if self._certificate.changed():
                self._reload()

    def _log_request(self, handler: Any) -> None:
        status = handler.get_status()
        refused = status in (401, 403, 429)
        held_back = self._refusals.passes() if refused else 0
        if held_back is None:
            return
        caller = getattr(handler, "caller", None)
        log = self.log.error if self.failed(handler) else self.log.warning if refused else self.log.debug
        log(
            "%d %s %s",
            status,
            handler.request.method,
            handler.request.path,
            extra={
                "status": status,
                "address": handler.request.remote_ip,
                "token": caller.token if caller else None,
                "seconds": round(handler.request.request_time(), 4),
                **({"held_back": held_back} if held_back else {}),
            },
        )


def _connections() -> int:
    """Return the number of connections that this process's limit of open files allows."""
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, min(files, 1 << 16) - _OTHER_FILES)


def _notify(word: bytes) -> None:
    """Notify systemd, if it started this process."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address.replace("@", "\0", 1))
            sock.send(word)
