"""The users' servers that have GPUs: what was chosen for each, and the leases that are acquired at their start.

This service holds such a lease until the server itself holds it, because a worker ends with its last holder.
From then on the lease ends with the server, even if the hub or this service restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jupyter_gpupool.client import requests
from jupyter_gpupool.core.errors import (
    ImpossibleRequest,
    InvalidRequest,
    PoolError,
    UnknownLease,
    UnknownNamespace,
)
from jupyter_gpupool.core.files import write_atomically
from jupyter_gpupool.core.models import LeaseState, Request
from jupyter_gpupool.hub.options import GPUOptions
from jupyter_gpupool.transport.frames import WireError
from jupyter_gpupool.transport.handshake import Refused
from jupyter_gpupool.transport.lifeline import Lifeline

from .identity import mark, marked
from .pool import Ceiling, HubPool

#: How often the hub is asked which servers run, in seconds, and the minimum age of those servers.
_CHECK_INTERVAL_S = 15.0
_MIN_AGE_S = 30.0


@dataclass
class Server:
    """One server of a user. ``taken``: the server itself holds its lease."""

    user: str
    name: str
    namespace: str
    mode: str
    choice: GPUOptions
    lease: str
    taken: bool = False
    secret: str = field(default="", repr=False)
    since: float = field(default_factory=time.monotonic, repr=False)
    lifeline: Lifeline | None = field(default=None, repr=False)
    keeping: asyncio.Task[None] | None = field(default=None, repr=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def notify(self) -> None:
        """Wake the calls that wait for a change of this server."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    @property
    def mark(self) -> str:
        """The mark of this server's requests."""
        return mark(self.user, self.name)

    def saved(self) -> dict[str, Any]:
        """Return what the file of servers contains of this one."""
        kept = ("user", "name", "namespace", "mode", "lease", "taken")
        return {**{k: getattr(self, k) for k in kept}, "choice": asdict(self.choice)}


class Servers:
    """The servers that have GPUs.

    ``runs`` asks the hub whether a user's server runs; it raises OSError if the hub does not answer.
    ``secure`` says whether workers are reached over TLS.
    """

    def __init__(
        self,
        pool: HubPool,
        file: Path,
        runs: Callable[[str, str], Awaitable[bool]],
        secure: bool = False,
    ) -> None:
        self._pool = pool
        self._file = file
        self._runs = runs
        self.secure = secure
        self._servers: dict[tuple[str, str], Server] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._looking: asyncio.Task[None] | None = None
        self._leases: dict[str, Server] = {}  # by lease that is not held yet
        # Connecting to a worker blocks, and many servers may start at once.
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="gpupool-hold")

    # -- life

    async def start(self) -> None:
        """Read the servers from the file. Their leases are in the ledger."""
        for said in self._read():
            server = Server(**{**said, "choice": GPUOptions.from_json(said["choice"])})
            self._servers[server.user, server.name] = server
            self._enforce(server)
        self._pool.listen(self._on_change)
        self._looking = asyncio.create_task(self._check())

    async def stop(self) -> None:
        """Stop holding leases. Those that no server holds yet end."""
        tasks = [self._looking, *(server.keeping for server in self._servers.values())]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(t for t in tasks if t is not None), return_exceptions=True)
        for server in self._servers.values():
            await self._stop_holding(server)
        self._threads.shutdown(wait=False)

    def _on_change(self, change: dict[str, Any]) -> None:
        # Wake only the server of this lease: to wake all for every change is too slow with a hundred servers.
        server = self._leases.get(change["lease"]["id"])
        if server is not None:
            server.notify()

    # -- what the hub says

    async def begin(
        self, user: str, name: str, namespace: str, lease: str, mode: str, choice: GPUOptions
    ) -> dict[str, Any]:
        """Request the lease of a server that starts. Raises PoolError, and then leaves nothing behind."""
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
        """Return the status as soon as it differs from ``state`` and ``position``, or after ``wait_s`` seconds.

        Each call is a heartbeat of a queued request.
        """
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
        """Release what the server holds. With ``lease``, only if that is its current one."""
        async with self._lock(user, name):
            known = self._servers.get((user, name))
            if not lease or known is None or known.lease == lease:
                await self._end(user, name)

    # -- what a server says

    async def of(self, user: str, name: str) -> dict[str, Any]:
        """Return to a server what was chosen for it, and its lease with the lease's secret."""
        server = self._find(user, name)
        answer = {"mode": server.mode, "choice": server.choice.to_json(), "lease": None, "secret": ""}
        if server.mode == "server":
            lease = await self._pool.wait(server.lease, user, 0.0)
            answer.update(lease=lease.to_json(), secret=server.secret)
        return answer

    async def taken(self, user: str, name: str) -> None:
        """Stop holding the lease, because the server itself holds it now."""
        server = self._find(user, name)
        if not server.taken:
            server.taken, server.secret = True, ""
            self._write()
        await self._stop_holding(server)

    # -- how it works

    def _find(self, user: str, name: str) -> Server:
        server = self._servers.get((user, name))
        if server is None:
            raise UnknownLease("no GPUs were chosen for this server")
        return server

    def _lock(self, user: str, name: str) -> asyncio.Lock:
        return self._locks.setdefault((user, name), asyncio.Lock())

    async def _admit(self, user: str, namespace: str) -> None:
        """Let a user request GPUs in the namespace of their group at the hub; create it if there is none."""
        tenants = self._pool.tenants
        try:
            await tenants.find(namespace)
        except UnknownNamespace:
            with contextlib.suppress(PoolError):  # another server of that group has just done it
                await tenants.create_namespace(None, namespace, {"description": "a group of the hub"})
        await self._pool.belongs(user, namespace)

    def _enforce(self, server: Server) -> None:
        lent = server.lease if server.mode == "server" else ""
        self._pool.ceilings[server.mark] = Ceiling(server.choice, lent)

    def _request(self, server: Server) -> Request:
        fields = server.choice.request_fields()
        return Request(
            id=server.lease,
            owner=server.user,
            namespace=server.namespace,
            secret_sha256=hashlib.sha256(server.secret.encode()).hexdigest(),
            label=f"server {server.name}".strip()[:100],
            client=marked("jupyterhub", server.user, server.name),
            **fields,
        )

    async def _status(self, server: Server) -> dict[str, Any]:
        if server.mode == "kernel":
            return {"state": "ACTIVE", "position": None, "reason": ""}
        lease = await self._pool.wait(server.lease, server.user, 0.0)
        state = lease.state.value
        if lease.state is LeaseState.ACTIVE and server.lifeline is None and not server.taken:
            state = LeaseState.GRANTED.value  # this service will hold it in a moment
        return {"state": state, "position": lease.position, "reason": lease.reason}

    async def _keep(self, server: Server) -> None:
        """Hold the lease from its grant until the server holds it."""
        try:
            while True:
                changed = server.changed
                lease = await self._pool.wait(server.lease, server.user, 0.0)
                if lease.state not in (LeaseState.QUEUED, LeaseState.GRANTED):
                    break
                await changed.wait()
            if lease.state.ended:
                return
            client: Any = self  # it has `secure`, as a client has
            spec = requests.attach_spec(client, lease, server.secret, "remote")
            loop = asyncio.get_running_loop()
            server.lifeline = await loop.run_in_executor(self._threads, Lifeline, spec)
            server.notify()
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

    async def _stop_holding(self, server: Server) -> None:
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
        # Release every lease of that server, also those that this process does not know.
        for lease in await self._pool.of_server(user, mark(user, name)):
            with contextlib.suppress(PoolError):  # it has just ended by itself
                await self._pool.release(lease.id, None, "its server was stopped")
        if server is not None:
            await self._stop_holding(server)

    async def _check(self) -> None:
        """End what belongs to servers that no longer run: the hub may have missed their end."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            before = time.monotonic() - _MIN_AGE_S
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
            servers: list[dict[str, Any]] = json.loads(self._file.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as e:
            raise InvalidRequest(f"cannot read {self._file} ({e}); move it away, and start again") from None
        return servers

    def _write(self) -> None:
        write_atomically(self._file, json.dumps([server.saved() for server in self._servers.values()]))
