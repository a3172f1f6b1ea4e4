"""The servers that have GPUs: what was chosen for each, and the leases of those that take them at their start.

Such a lease is held from here until the server itself has taken hold of it (its worker ends with its last holder).
From then on it lives and dies with the server, whatever becomes of the hub or of this service.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ... import holder
from ...pool.errors import ImpossibleRequest, InvalidRequest, PoolError, UnknownLease, UnknownNamespace
from ...pool.models import LeaseState, Request
from ...remote.handshake import Refused
from ...remote.lifeline import Lifeline
from ...remote.wire import WireError
from .identity import mark, marked
from .options import Choice
from .pool import Ceiling, HubPool

#: How often the hub is asked which servers run, in seconds, and how old a server must be to be asked about.
_LOOK_S = 15.0
_YOUNG_S = 30.0


@dataclass
class Server:
    """One server of a user. ``taken``: it holds its lease itself."""

    user: str
    name: str
    namespace: str
    mode: str
    choice: Choice
    lease: str
    taken: bool = False
    secret: str = field(default="", repr=False)
    since: float = field(default_factory=time.monotonic, repr=False)
    lifeline: Lifeline | None = field(default=None, repr=False)
    keeping: asyncio.Task | None = field(default=None, repr=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def tell(self) -> None:
        """Whoever waits for news of it is to look."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    @property
    def mark(self) -> str:
        return mark(self.user, self.name)

    def saved(self) -> dict[str, Any]:
        kept = ("user", "name", "namespace", "mode", "lease", "taken")
        return {**{k: getattr(self, k) for k in kept}, "choice": asdict(self.choice)}


class Servers:
    """``secure`` and ``ca``: the way to workers. ``runs``: whether the hub says that a server of a user runs; it
    raises OSError when the hub cannot be asked."""

    def __init__(
        self,
        pool: HubPool,
        file: Path,
        runs: Callable[[str, str], Awaitable[bool]],
        secure: bool = False,
        ca: str = "",
    ) -> None:
        self._pool = pool
        self._file = file
        self._runs = runs
        self.secure, self.ca = secure, ca
        self._servers: dict[tuple[str, str], Server] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._looking: asyncio.Task | None = None
        self._leases: dict[str, Server] = {}  # those that are about to be held
        # A connection to a worker is waited for; many servers may start at once.
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="gpupool-hold")

    # -- life

    async def start(self) -> None:
        """Take up what was known. The leases themselves are the ledger's."""
        for said in self._read():
            server = Server(**{**said, "choice": Choice(**said["choice"])})
            self._servers[server.user, server.name] = server
            self._enforce(server)
        self._pool.listen(self._heard)
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        tasks = [self._looking, *(server.keeping for server in self._servers.values())]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(t for t in tasks if t is not None), return_exceptions=True)
        for server in self._servers.values():
            await self._let_go(server)
        self._threads.shutdown(wait=False)

    def _heard(self, change: dict[str, Any]) -> None:
        # Of its own lease alone: a hundred servers that look at every change of a hundred leases are too slow.
        server = self._leases.get(change["lease"]["id"])
        if server is not None:
            server.tell()

    # -- what the hub says

    async def begin(
        self, user: str, name: str, namespace: str, lease: str, mode: str, choice: Choice
    ) -> dict[str, Any]:
        """That server is about to start. Raises PoolError, with nothing left behind."""
        async with self._lock(user, name):
            known = self._servers.get((user, name))
            if known is not None and known.lease == lease:
                return await self._status(known)
            await self._end(user, name)
            server = Server(user, name, namespace, mode, choice, lease, secret=secrets.token_urlsafe(32))
            await self._admit(user, namespace)
            request = self._request(server)
            if mode == "server":
                self._leases[lease] = server
                try:
                    await self._pool.lend(request)
                except BaseException:
                    del self._leases[lease]
                    raise
            else:
                forecast = await self._pool.could(request)
                if forecast["outcome"] == "impossible":
                    raise ImpossibleRequest(forecast["reason"])
            self._servers[user, name] = server
            self._enforce(server)
            self._write()
            if mode == "server":
                server.keeping = asyncio.create_task(self._keep(server))
            return await self._status(server)

    async def news(
        self, user: str, name: str, wait_s: float, state: str, position: int | None
    ) -> dict[str, Any]:
        """As soon as it differs from what is known. While it waits in the queue, it lives by these questions."""
        server = self._find(user, name)
        if server.mode == "server":
            with contextlib.suppress(PoolError):  # it has ended; the answer says why
                await self._pool.heartbeat(server.lease, user)
        changed = server.changed
        status = await self._status(server)
        if (status["state"], status["position"]) == (state, position):
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), wait_s)
            status = await self._status(server)
        return status

    async def end(self, user: str, name: str, lease: str = "") -> None:
        async with self._lock(user, name):
            known = self._servers.get((user, name))
            if not lease or known is None or known.lease == lease:
                await self._end(user, name)

    # -- what a server says

    async def of(self, user: str, name: str) -> dict[str, Any]:
        """What a server is told of itself; its lease's secret, too."""
        server = self._find(user, name)
        answer = {"mode": server.mode, "choice": server.choice.to_json(), "lease": None, "secret": ""}
        if server.mode == "server":
            lease = await self._pool.wait(server.lease, user, 0.0)
            answer.update(lease=lease.to_json(), secret=server.secret)
        return answer

    async def taken(self, user: str, name: str) -> None:
        """The server holds its lease; from here nobody does."""
        server = self._find(user, name)
        if not server.taken:
            server.taken, server.secret = True, ""
            self._write()
        await self._let_go(server)

    # -- how it works

    def _find(self, user: str, name: str) -> Server:
        server = self._servers.get((user, name))
        if server is None:
            raise UnknownLease("no GPUs were chosen for this server")
        return server

    def _lock(self, user: str, name: str) -> asyncio.Lock:
        return self._locks.setdefault((user, name), asyncio.Lock())

    async def _admit(self, user: str, namespace: str) -> None:
        """Who is in a group of the hub may use the namespace that it stands for, which there is from then on."""
        tenants = self._pool.tenants
        try:
            await tenants.admit(user, namespace)
        except UnknownNamespace:
            with contextlib.suppress(PoolError):  # another server of that group has just done it
                await tenants.create_namespace(None, namespace, {"description": "a group of the hub"})
            await tenants.admit(user, namespace)

    def _enforce(self, server: Server) -> None:
        lent = server.lease if server.mode == "server" else ""
        self._pool.ceilings[server.mark] = Ceiling(server.choice, lent)

    def _request(self, server: Server) -> Request:
        wish = server.choice.wish()
        return Request(
            id=server.lease,
            owner=server.user,
            namespace=server.namespace,
            secret_sha256=hashlib.sha256(server.secret.encode()).hexdigest(),
            label=f"server {server.name}".strip()[:100],
            client=marked("jupyterhub", server.user, server.name),
            **wish,
        )

    async def _status(self, server: Server) -> dict[str, Any]:
        if server.mode == "kernel":
            return {"state": "ACTIVE", "position": None, "reason": ""}
        lease = await self._pool.wait(server.lease, server.user, 0.0)
        state = lease.state.value
        if lease.state is LeaseState.ACTIVE and server.lifeline is None and not server.taken:
            state = LeaseState.GRANTED.value  # in a moment it is held
        return {"state": state, "position": lease.position, "reason": lease.reason}

    async def _keep(self, server: Server) -> None:
        """Hold the lease once it is granted, until the server does."""
        try:
            while True:
                changed = server.changed
                lease = await self._pool.wait(server.lease, server.user, 0.0)
                if lease.state not in (LeaseState.QUEUED, LeaseState.GRANTED):
                    break
                await changed.wait()
            if lease.state.ended:
                return
            way: Any = self  # it knows whether the way is to be TLS, as a client does
            spec = holder.attach_spec(way, lease, server.secret, "remote")
            loop = asyncio.get_running_loop()
            server.lifeline = await loop.run_in_executor(self._threads, Lifeline, spec)
            server.tell()
            while not server.taken:
                await self._pool.heartbeat(lease.id, server.user)
                await asyncio.sleep(lease.ttl_s / 4)
        except (Refused, OSError, WireError) as e:
            with contextlib.suppress(PoolError):
                await self._pool.release(server.lease, None, f"its worker cannot be reached: {e}")
        except PoolError as e:
            self._pool.log.info("Server %s of %s: %s", server.name or "-", server.user, e)
        finally:
            self._leases.pop(server.lease, None)

    async def _let_go(self, server: Server) -> None:
        lifeline, server.lifeline = server.lifeline, None
        if lifeline is not None:
            await asyncio.get_running_loop().run_in_executor(self._threads, lifeline.release)

    async def _end(self, user: str, name: str) -> None:
        server = self._servers.pop((user, name), None)
        self._pool.ceilings.pop(mark(user, name), None)
        if server is not None:
            if server.keeping is not None:
                server.keeping.cancel()
            self._write()
        # Whatever this process knows, nothing of that server is to be left.
        for lease in await self._pool.of_server(user, mark(user, name)):
            with contextlib.suppress(PoolError):  # it has just ended by itself
                await self._pool.release(lease.id, None, "its server was stopped")
        if server is not None:
            await self._let_go(server)

    async def _look(self) -> None:
        """The hub may have been away when a server ended, or have forgotten what it began."""
        while True:
            await asyncio.sleep(_LOOK_S)
            before = time.monotonic() - _YOUNG_S
            for key, server in list(self._servers.items()):
                if server.since > before or self._servers.get(key) is not server:
                    continue
                try:
                    if not await self._runs(*key):
                        await self.end(*key, server.lease)
                except (OSError, PoolError) as e:
                    self._pool.log.debug("Cannot ask the hub about the server of %s: %s", key[0], e)
                    break

    # -- its file

    def _read(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self._file.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as e:
            raise InvalidRequest(f"{self._file} cannot be read ({e}); move it away") from None

    def _write(self) -> None:
        draft = self._file.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            json.dump([server.saved() for server in self._servers.values()], f)
        os.replace(draft, self._file)
