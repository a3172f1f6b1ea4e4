"""The pool of a Jupyter server's user: hosted in this process, in another of the user's, or configured."""

from __future__ import annotations

import asyncio
import getpass
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketClientConnection
from traitlets import Bool, Enum, TraitError, Unicode, default
from traitlets.config import LoggingConfigurable

from jupyter_gpupool.client import bundle, discovery, event_stream
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.client.pool_connection import NOT_OFFERED, Passed
from jupyter_gpupool.client.pool_finder import TOKEN_VARIABLE, URL_VARIABLE, ca_for
from jupyter_gpupool.core.checks import Check, from_json
from jupyter_gpupool.core.errors import InvalidRequest, NotSupported, PoolUnreachable
from jupyter_gpupool.core.models import Lease, Request
from jupyter_gpupool.engines.registry import ENGINES
from jupyter_gpupool.pool.tenancy.namespaces import Namespaces
from jupyter_gpupool.server.access.authentication import TokenStore
from jupyter_gpupool.server.http.handlers import MAX_BODY, standalone_application
from jupyter_gpupool.server.http.servers import SERVERS
from jupyter_gpupool.server.service.backend import PoolBackend, TenantsBackend
from jupyter_gpupool.server.service.service import PoolService

from . import process_state
from .joined_tenants import DelegatingTenants, RemoteTenants
from .lease_poller import LeasePoller

T = TypeVar("T")


class GPUPool(LoggingConfigurable):
    """The :class:`PoolBackend` of a Jupyter server: it passes each call on to the pool that it hosts or has joined.

    A configured pool is joined. Without one, each user has one pool: if another process of the user hosts it, this
    server joins it, and takes over when that process ends. All calls raise :mod:`jupyter_gpupool.core.errors`.
    """

    url = Unicode(
        help="Address of the pool to join, such as http://gpu-server:56001. Empty: this user's own pool. Default: the "
        "environment variable GPUPOOL_URL, else the first server of the bundle in ~/.gpupool or /etc/gpupool. "
        "All users of this Jupyter server act with the same token.",
    ).tag(config=True)
    token = Unicode(
        help="The token for the pool at `url`. Default: the content of `token_file`, else the environment variable "
        "GPUPOOL_TOKEN.",
    ).tag(config=True)
    token_file = Unicode(
        help="A file that contains the token, which then need not be in a configuration file."
    ).tag(config=True)
    share = Bool(
        True,
        help="Let this user's terminals, scripts and kernels find the pool that this server hosts. They reach it at "
        "a loopback port of its own, with a token from a file that only this user can read.",
    ).tag(config=True)

    engine = Enum(
        list(ENGINES),
        "local",
        help="Where the workers of a pool hosted here run: on this machine, or (`ray`) on a Ray cluster.",
    ).tag(config=True)

    single_user = Bool(
        False,
        help="Whether the server has one user, whom its identity provider gives a new name in every browser. Then "
        "every lease belongs to the user who runs the server.",
    )

    @default("url")
    def _default_url(self) -> str:
        url = os.environ.get(URL_VARIABLE, "")
        given = None if url else bundle.find()
        return url if given is None else given.urls[0]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._host: _Host | None = None
        self._joined: JoinedPool | None = None
        self._settling = asyncio.Lock()
        self._stopped = False
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._environment: dict[str, str | None] = {}
        self._tenants = DelegatingTenants(lambda call: self._ask(lambda p: call(p.tenants)), self._owner)

    @property
    def tenants(self) -> TenantsBackend:
        """The namespaces, members and audit trail of the pool."""
        return self._tenants

    # -- life

    async def start(self) -> None:
        """Join a pool or host one. Raises PoolError."""
        where = await self._settle()
        if self.url:
            await where.pool(None)  # report an unreachable pool now, not at the first kernel

    async def stop(self) -> None:
        """Leave the pool; end it with all of its leases if it is hosted here."""
        async with self._settling:
            self._stopped = True
            if self._host is not None:
                host, self._host = self._host, None
                await host.stop()
            self._leave()
            for name, before in self._environment.items():
                if before is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = before

    async def _settle(self) -> PoolBackend:
        """Return the pool that this server hosts or has joined; host or join one if it has none."""
        async with self._settling:
            if self._host is not None:
                return self._host.service
            if self._joined is not None:
                return self._joined
            if self._stopped:
                raise PoolUnreachable("this Jupyter server is shutting down")
            if self.url:
                return self._join(self._configured())
            address = await asyncio.to_thread(discovery.find)
            if address is not None and address.pid != os.getpid():
                self.log.info("Joining the GPU pool of process %d", address.pid)
                return self._join(address)
            await asyncio.to_thread(discovery.wait_for_ending)
            try:
                service = PoolService(parent=self)
            except TraitError as e:
                raise InvalidRequest(f"the pool's configuration is wrong: {e}") from None
            service.listen(self._notify)
            host = _Host(service, self.share)
            await host.start()
            self._host = host
            return host.service

    def _configured(self) -> discovery.PoolAddress:
        token = self.token
        if not token and self.token_file:
            try:
                token = Path(self.token_file).expanduser().read_text().strip()
            except (OSError, UnicodeDecodeError) as e:
                raise InvalidRequest(
                    f"GPUPool.token_file: cannot read {self.token_file} ({e}); write the pool's token to it"
                ) from None
        token, ca, login = token or os.environ.get(TOKEN_VARIABLE, ""), "", ""
        also: tuple[str, ...] = ()
        given = bundle.find()
        if given is not None and given.covers(self.url):
            login = "" if token else given.login
            token, ca, also = token or ("" if login else given.token), given.ca, given.urls
        else:
            ca = ca_for(self.url)
        # Let this server's kernels and terminals find the same pool.
        for name, value in ((URL_VARIABLE, self.url), (TOKEN_VARIABLE, token)):
            self._environment.setdefault(name, os.environ.get(name))
            os.environ[name] = value
        return discovery.PoolAddress(self.url, token, ca=ca, also=also, login=login)

    def _join(self, address: discovery.PoolAddress) -> JoinedPool:
        joined = self._joined = JoinedPool(address)
        if self._listeners:
            joined.listen(self._notify)
        return joined

    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call ``callback`` for every change of a lease's state; about once a second if the pool is joined.

        Returns a function that ends this.
        """
        self._listeners.append(callback)
        if self._joined is not None and not self._joined.is_listening:
            self._joined.listen(self._notify)

        def stop() -> None:
            if callback in self._listeners:
                self._listeners.remove(callback)

        return stop

    def _notify(self, change: dict[str, Any]) -> None:
        for listener in list(self._listeners):
            try:
                listener(change)
            except Exception:
                self.log.exception("A listener failed on lease %s", change["lease"]["id"])

    def _leave(self) -> None:
        if self._joined is not None:
            self._joined.close()
            self._joined = None

    async def _ask(self, call: Callable[[PoolBackend], Awaitable[T]]) -> T:
        """Make a call of the current pool; once more, of its successor, if the process that hosted it has ended."""
        where = await self._settle()
        try:
            return await call(where)
        except PoolUnreachable:
            if where is not self._joined or self.url:
                raise
        self._leave()
        return await call(await self._settle())

    def _owner(self, owner: str | None) -> str | None:
        return None if self.single_user else owner

    # -- what the handlers call

    def scope(self, owner: str) -> str | None:
        """Return whose leases ``owner`` sees: a name, or None for everybody's."""
        return self._owner(owner)

    def named(self, owner: str) -> str:
        """Return the name under which ``owner`` holds leases."""
        return getpass.getuser() if self.single_user else owner

    async def pool(self, owner: str | None) -> dict[str, Any]:
        return await self._ask(lambda p: p.pool(self._owner(owner)))

    async def look(self) -> tuple[dict[str, Any], list[Lease], Namespaces]:
        """Return the whole pool, for the feed of a hosted pool; a joined one has :meth:`events`."""
        return await self._ask(lambda p: p.look())

    async def events(self, query: dict[str, str]) -> WebSocketClientConnection | None:
        """Return a connection to the feed of a joined pool, resumed from ``query``; None if the pool is hosted here."""

        async def connect(pool: PoolBackend) -> WebSocketClientConnection | None:
            return await pool.events(query) if isinstance(pool, JoinedPool) else None

        return await self._ask(connect)

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]:
        return await self._ask(lambda p: p.leases(self._owner(owner), include_ended))

    async def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        if self.single_user:
            request = replace(request, owner=getpass.getuser())
        return await self._ask(lambda p: p.request(request, wait_s))

    async def forecast(self, request: Request) -> dict[str, Any]:
        return await self._ask(lambda p: p.forecast(request))

    async def wait(
        self,
        lease_id: str,
        owner: str | None,
        wait_s: float,
        state: str | None = None,
        position: int | None = None,
    ) -> Lease:
        return await self._ask(lambda p: p.wait(lease_id, self._owner(owner), wait_s, state, position))

    async def heartbeat(self, lease_id: str, owner: str | None) -> Lease:
        return await self._ask(lambda p: p.heartbeat(lease_id, self._owner(owner)))

    async def release(self, lease_id: str, owner: str | None, reason: str = "released") -> Lease:
        return await self._ask(lambda p: p.release(lease_id, self._owner(owner), reason))

    async def resize(
        self, lease_id: str, owner: str | None, partial: float | None, memory_mib: int | None
    ) -> Lease:
        return await self._ask(lambda p: p.resize(lease_id, self._owner(owner), partial, memory_mib))

    async def history(
        self, since: float | None, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        return await self._ask(lambda p: p.history(since, step, gpus))

    async def health(self) -> tuple[float, tuple[Check, ...]]:
        return await self._ask(lambda p: p.health())

    async def administer(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, accept: str
    ) -> Passed:
        """Pass an administrator's call on to the joined pool. Raises NotSupported if the pool is hosted here."""
        where = await self._settle()
        if not isinstance(where, JoinedPool):
            if path.startswith("/servers/"):
                raise NotSupported(
                    "a Jupyter server cannot drain the pool that it hosts; run `gpupool server drain` in a terminal"
                )
            raise NotSupported(NOT_OFFERED)
        return await where.administer(method, path, query, body, accept)


class _Host:
    """A pool in this process, with a loopback port for this server's kernels and the user's other processes."""

    def __init__(self, service: PoolService, share: bool) -> None:
        self.service = service
        self._share = share
        self._server: HTTPServer | None = None

    async def start(self) -> None:
        await self.service.start()
        # Jupyter's own port may require TLS, a password or a hub. The user's own processes need none of these here.
        try:
            sockets = bind_sockets(0, "127.0.0.1")
            token = discovery.new_token()
            application = standalone_application(
                self.service, TokenStore(token), SERVERS, log_function=lambda handler: None
            )
            self._server = HTTPServer(application, max_body_size=4 * MAX_BODY)
            self._server.add_sockets(sockets)
            process_state.address = discovery.PoolAddress(
                f"http://127.0.0.1:{sockets[0].getsockname()[1]}", token
            )
            if self._share:
                discovery.publish(process_state.address.url, token)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        process_state.address = None
        if self._server is not None:
            discovery.announce_end()
            self._server.stop()
        await self.service.stop()
        if self._server is not None:
            await self._server.close_all_connections()
            discovery.withdraw()


class JoinedPool:
    """The :class:`PoolBackend` of a pool in another process. The address's token decides who the caller is."""

    def __init__(self, address: discovery.PoolAddress) -> None:
        self._pollers: list[LeasePoller] = []
        # If that process has ended, this one takes its place at once: so the client does not wait for its return.
        self._client = PoolClient(
            address.url, address.token, patience_s=0.5, ca=address.ca, also=address.also, login=address.login
        )
        self._tenants = RemoteTenants(self._client)

    @property
    def tenants(self) -> TenantsBackend:
        return self._tenants

    def close(self) -> None:
        for poller in self._pollers:
            poller.stop()
        self._client.close()

    @property
    def is_listening(self) -> bool:
        """Whether somebody is notified of the pool's changes."""
        return bool(self._pollers)

    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        poller = LeasePoller(self, callback)
        self._pollers.append(poller)

        def stop() -> None:
            poller.stop()
            if poller in self._pollers:
                self._pollers.remove(poller)

        return stop

    def scope(self, owner: str) -> str | None:
        return owner

    def named(self, owner: str) -> str:
        return owner

    async def pool(self, owner: str | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.pool)

    async def look(self) -> tuple[dict[str, Any], list[Lease], Namespaces]:
        raise PoolUnreachable("another process hosts the GPU pool now; connect again")

    async def events(self, query: dict[str, str]) -> WebSocketClientConnection:
        return await event_stream.connect(self._client, query)

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]:
        return await asyncio.to_thread(self._client.leases, include_ended)

    async def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        return await asyncio.to_thread(self._client.request, request, wait_s)

    async def forecast(self, request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.forecast, request)

    async def wait(
        self,
        lease_id: str,
        owner: str | None,
        wait_s: float,
        state: str | None = None,
        position: int | None = None,
    ) -> Lease:
        lease = await asyncio.to_thread(self._client.lease, lease_id)
        if wait_s <= 0 or lease.state.value != state or (position is not None and lease.position != position):
            return lease
        return await asyncio.to_thread(self._client.wait, lease_id, lease, wait_s)

    async def heartbeat(self, lease_id: str, owner: str | None) -> Lease:
        return await asyncio.to_thread(self._client.heartbeat, lease_id)

    async def release(self, lease_id: str, owner: str | None, reason: str = "released") -> Lease:
        return await asyncio.to_thread(self._client.release, lease_id)

    async def resize(
        self, lease_id: str, owner: str | None, partial: float | None, memory_mib: int | None
    ) -> Lease:
        return await asyncio.to_thread(self._client.resize, lease_id, partial, memory_mib)

    async def history(
        self, since: float | None, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.history, since, step, gpus)

    async def health(self) -> tuple[float, tuple[Check, ...]]:
        answer = await asyncio.to_thread(self._client.health)
        return time.time() - answer["age_s"], tuple(from_json(check) for check in answer["checks"])

    async def administer(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, accept: str
    ) -> Passed:
        return await asyncio.to_thread(self._client.pass_on, method, path, query, body, accept)
