"""The pool of the user who runs this Jupyter server: hosted here, by another of their processes, or configured."""

from __future__ import annotations

import asyncio
import getpass
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketClientConnection
from traitlets import Bool, Enum, Unicode, default
from traitlets.config import LoggingConfigurable

from ..api import bundle, discovery, listening
from ..api.auth import TokenStore
from ..api.client import NOT_OFFERED, Passed, PoolClient
from ..api.engines import ENGINES
from ..api.handlers import MAX_BODY, standalone_application
from ..api.health import Check, from_json
from ..api.server_calls import SERVERS
from ..api.service import PoolService
from ..holder import TOKEN_VARIABLE, URL_VARIABLE, ca_for
from ..pool.errors import InvalidRequest, NotOffered, PoolUnreachable
from ..pool.models import Lease, Request
from ..pool.namespaces import Namespaces
from . import door
from .tenants import TenantsElsewhere, TenantsWherever
from .transitions import Watch

T = TypeVar("T")


class GPUPool(LoggingConfigurable):
    """Offers the calls of :class:`~jupyter_gpupool.api.service.PoolService` that the handlers use.

    A pool that is configured is joined. Else one user has one pool: when another process of theirs hosts it
    already, calls go there; when that process is gone, this one takes over. All calls raise
    :mod:`jupyter_gpupool.pool.errors`.
    """

    url = Unicode(
        help="Address of the pool to join, such as http://gpu-server:56001. Empty: this user's own pool. Default: the "
        "environment variable GPUPOOL_URL, else the first server of the bundle in ~/.gpupool or /etc/gpupool. "
        "Everybody who may use this Jupyter server acts with the one token.",
    ).tag(config=True)
    token = Unicode(
        help="The token that the pool at `url` wants. Default: what `token_file` holds, else the environment variable "
        "GPUPOOL_TOKEN.",
    ).tag(config=True)
    token_file = Unicode(
        help="A file that holds the token, which then need not be in a configuration file."
    ).tag(config=True)
    share = Bool(
        True,
        help="Let this user's terminals, scripts and kernels find the pool that this server hosts. They reach it at "
        "a loopback port of its own, with a token that only a file readable by this user holds.",
    ).tag(config=True)

    engine = Enum(
        list(ENGINES),
        "local",
        help="Where a pool that is hosted here has its workers: on this machine, or (`ray`) on a Ray cluster.",
    ).tag(config=True)

    nameless = Bool(
        False,
        help="Whether the server's identity provider gives its one user a new name in every browser. Then everything "
        "belongs to whoever runs the server.",
    )

    @default("url")
    def _default_url(self) -> str:
        url = os.environ.get(URL_VARIABLE, "")
        given = None if url else bundle.find()
        return url if given is None else given.urls[0]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._host: _Host | None = None
        self._joined: _Joined | None = None
        self._settling = asyncio.Lock()
        self._stopped = False
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._environment: dict[str, str | None] = {}
        #: The calls of :class:`~jupyter_gpupool.api.tenants.Tenants`, wherever the pool is.
        self.tenants = TenantsWherever(lambda call, owner: self._ask(lambda p: call(p, self._owner(owner))))

    # -- life

    async def start(self) -> None:
        """Join a pool or host this user's. Raises PoolError."""
        where = await self._settle()
        if self.url:
            await where.pool(None)  # better said now than at somebody's first kernel

    async def stop(self) -> None:
        """End a pool that is hosted here, with all of its leases."""
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

    async def _settle(self) -> PoolService | _Joined:
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
            service = PoolService(parent=self)
            service.listen(self._tell)
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
                    f"GPUPool.token_file: {self.token_file} cannot be read ({e}); write the pool's token there"
                ) from None
        token, ca = token or os.environ.get(TOKEN_VARIABLE, ""), ""
        also: tuple[str, ...] = ()
        given = bundle.find()
        if given is not None and given.covers(self.url):
            token, ca, also = token or given.token, given.ca, given.urls
        else:
            ca = ca_for(self.url)
        # The kernels and terminals of this server are to find the same pool.
        for name, value in ((URL_VARIABLE, self.url), (TOKEN_VARIABLE, token)):
            self._environment.setdefault(name, os.environ.get(name))
            os.environ[name] = value
        return discovery.PoolAddress(self.url, token, ca=ca, also=also)

    def _join(self, address: discovery.PoolAddress) -> _Joined:
        joined = self._joined = _Joined(address)
        if self._listeners:
            joined.watch = Watch(joined, self._tell)
        return joined

    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """As :meth:`PoolService.listen`, wherever the pool is; of one elsewhere it hears about every second."""
        self._listeners.append(callback)
        if self._joined is not None and self._joined.watch is None:
            self._joined.watch = Watch(self._joined, self._tell)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def _tell(self, change: dict[str, Any]) -> None:
        for listener in list(self._listeners):
            try:
                listener(change)
            except Exception:
                self.log.exception("A listener failed on lease %s", change["lease"]["id"])

    def _leave(self) -> None:
        if self._joined is not None:
            self._joined.close()
            self._joined = None

    async def _ask(self, call: Callable[[Any], Any]) -> Any:
        where = await self._settle()
        try:
            return await call(where)
        except PoolUnreachable:
            if where is not self._joined or self.url:
                raise
        self._leave()
        return await call(await self._settle())

    def _owner(self, owner: str | None) -> str | None:
        return None if self.nameless else owner

    # -- what the handlers call

    def scope(self, owner: str) -> str | None:
        """Whose leases ``owner`` sees: None for everybody's."""
        return self._owner(owner)

    def named(self, owner: str) -> str:
        """The name whose leases ``owner``'s are."""
        return getpass.getuser() if self.nameless else owner

    async def pool(self, owner: str | None) -> dict[str, Any]:
        return await self._ask(lambda p: p.pool(self._owner(owner)))

    async def look(self) -> tuple[dict[str, Any], list[Lease], Namespaces]:
        """For a feed of a pool that is hosted here; of one elsewhere :meth:`events` has its own."""
        return await self._ask(lambda p: p.look())

    async def events(self, query: dict[str, str]) -> WebSocketClientConnection | None:
        """What the pool tells those who watch it, on from ``query``; None where it is hosted here."""
        return await self._ask(lambda p: p.events(query) if isinstance(p, _Joined) else _none())

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]:
        return await self._ask(lambda p: p.leases(self._owner(owner), include_ended))

    async def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        if self.nameless:
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

    async def release(self, lease_id: str, owner: str | None) -> Lease:
        return await self._ask(lambda p: p.release(lease_id, self._owner(owner)))

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
        """An administrator's call, answered by the pool that was joined. Raises NotOffered where it has none."""
        where = await self._settle()
        if not isinstance(where, _Joined):
            if path.startswith("/servers/"):
                raise NotOffered("this Jupyter server's own pool is drained in a terminal: `gpupool server drain`")
            raise NotOffered(NOT_OFFERED)
        return await where.administer(method, path, query, body, accept)


class _Host:
    """A pool in this process, with a door for this server's kernels and, if shared, the user's other processes."""

    def __init__(self, service: PoolService, share: bool) -> None:
        self.service = service
        self._share = share
        self._server: HTTPServer | None = None

    async def start(self) -> None:
        await self.service.start()
        # Jupyter's own port may want TLS, a password or a hub; what runs as this user needs none of them.
        try:
            sockets = bind_sockets(0, "127.0.0.1")
            token = discovery.new_token()
            application = standalone_application(
                self.service, TokenStore(token), SERVERS, log_function=lambda handler: None
            )
            self._server = HTTPServer(application, max_body_size=4 * MAX_BODY)
            self._server.add_sockets(sockets)
            door.address = discovery.PoolAddress(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", token)
            if self._share:
                discovery.publish(door.address.url, token)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        door.address = None
        if self._server is not None:
            discovery.withdraw()
            self._server.stop()
        await self.service.stop()
        if self._server is not None:
            await self._server.close_all_connections()


class _Joined:
    """The same calls, answered by the pool of another process of this user, which owns all it asks for."""

    def __init__(self, address: discovery.PoolAddress) -> None:
        self.watch: Watch | None = None
        # Should that process be gone, its place is to be taken at once.
        self._client = PoolClient(
            address.url, address.token, patience_s=0.5, ca=address.ca, also=address.also
        )
        self.tenants = TenantsElsewhere(self._client)

    def close(self) -> None:
        if self.watch is not None:
            self.watch.stop()
        self._client.close()

    async def pool(self, owner: str | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.pool)

    async def look(self) -> tuple[dict[str, Any], list[Lease], Namespaces]:
        raise PoolUnreachable("another process hosts the GPU pool now; connect again")

    async def events(self, query: dict[str, str]) -> WebSocketClientConnection:
        return await listening.connect(self._client, query)

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

    async def release(self, lease_id: str, owner: str | None) -> Lease:
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


async def _none() -> None:
    return None
