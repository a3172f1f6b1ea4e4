"""The Ray actor on each GPU server: it keeps a warm parent there, which forks the workers.

The pool and the actor exchange plain dictionaries. As a detached actor it outlives a pool that is killed, and records
how workers ended until a pool has read it. When the actor ends, its workers end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from jupyter_gpupool.core.errors import EngineError, SliceInUse
from jupyter_gpupool.core.models import GPU, Lease, LeaseState, Request, Slice, WorkerAddress
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.gpus.emulated import emulated_gpus
from jupyter_gpupool.gpus.nvml import nvml_gpus


class Agent:
    """The actor. The keys of ``settings`` are:

    ``name`` and ``host`` of this server; ``gpus``, the number that Ray counts here; ``emulate``, ``emulated_name`` and
    ``emulated_memory_mib``; and ``local``, the traits of this server's LocalEngine.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._engine = LocalEngine(**settings["local"])
        self._started: asyncio.Future[None] | None = None
        self._ended: dict[int, tuple[str, str, str]] = {}
        self._replaced: dict[int, tuple[str, dict[str, Any], str]] = {}
        self._seq = 0
        self._news = asyncio.Event()
        self._workers: dict[str, dict[str, Any]] = {}
        self._wanted: set[str] = set()
        self._engine.on_wake(self._on_wake)

    async def describe(self) -> dict[str, Any]:
        """Return the server's name, its GPUs, the running workers, and the ends of workers that no pool has read.

        The answer is ``{"name", "gpus", "workers": {lease: …}, "ended": {lease: [state, reason]}, "takes_client",
        "parking"}``, or
        ``{"failed": why}``. ``takes_client``: that :meth:`start` takes the request's client.
        """
        if self._started is None:
            self._started = asyncio.ensure_future(self._start())
        try:
            await asyncio.shield(self._started)
        except EngineError as e:
            self._started = None
            return {"failed": str(e)}
        return {
            "name": self._settings["name"],
            "gpus": [asdict(gpu) for gpu in self._gpus()],
            "workers": dict(self._workers),
            "ended": {lease_id: [state, reason] for lease_id, state, reason in self._ended.values()},
            "takes_client": True,
            "parking": self._parking(),
        }

    async def warm(self) -> None:
        """Return when the next worker can start at once, or cannot be started."""
        with contextlib.suppress(EngineError):
            await self._engine.until_warm()

    async def start(
        self,
        lease_id: str,
        secret_sha256: str,
        slices: list[dict[str, Any]],
        ttl_s: float,
        first: int = 0,
        client: str = "",
    ) -> dict[str, Any]:
        """Start a worker. Return the fields of its WorkerAddress, or ``{"failed": why}``.

        ``first``: the number of the first of these slices within the lease. ``client``: the request's.
        """
        return await self._start_worker(
            self._engine.start_worker, lease_id, secret_sha256, slices, ttl_s, first, client
        )

    async def receive(
        self,
        lease_id: str,
        secret_sha256: str,
        slices: list[dict[str, Any]],
        ttl_s: float,
        first: int = 0,
        client: str = "",
    ) -> dict[str, Any]:
        """Start a worker to which another server sends its lease. As :meth:`start`."""
        return await self._start_worker(
            self._engine.receive_worker, lease_id, secret_sha256, slices, ttl_s, first, client
        )

    async def _start_worker(
        self,
        start: Callable[[Lease, int], Awaitable[WorkerAddress]],
        lease_id: str,
        secret_sha256: str,
        slices: list[dict[str, Any]],
        ttl_s: float,
        first: int,
        client: str,
    ) -> dict[str, Any]:
        request = Request(lease_id, "", secret_sha256=secret_sha256, client=client)
        pieces = tuple(Slice(**piece) for piece in slices)
        try:
            lease = Lease(request, LeaseState.GRANTED, pieces, ttl_s=ttl_s)
            worker = await start(lease, first)
        except EngineError as e:
            return {"failed": str(e)}
        self._workers[lease_id] = {
            **worker.to_json(),
            "environment": worker.environment,
            "torch": worker.torch,
        }
        return self._workers[lease_id]

    async def park(self, lease_id: str, slices: list[dict[str, Any]]) -> dict[str, Any]:
        """Park the worker of a lease. Return ``{"mib": what is kept for it}``, or ``{"failed": why}``."""
        try:
            return {"mib": await self._engine.park_worker(_lease(lease_id, slices))}
        except EngineError as e:
            return {"failed": str(e)}

    async def resume(self, lease_id: str, slices: list[dict[str, Any]], first: int = 0) -> dict[str, Any]:
        """Bring the state of a parked lease back, on these slices. Return ``{}`` or ``{"failed": why}``.

        ``first``: the number of the first of these slices within the lease.
        """
        try:
            await self._engine.resume_worker(_lease(lease_id, slices), first)
        except EngineError as e:
            return {"failed": str(e)}
        return {}

    async def tell(self, lease_id: str, what: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Ask a worker for what workers on several servers do together. Return its answer, or ``{"failed": why}``."""
        try:
            return await self._engine.tell(lease_id, what, **fields)
        except EngineError as e:
            return {"failed": str(e)}

    async def send_ahead(self, lease_id: str, to: dict[str, Any]) -> dict[str, str]:
        """Let a worker send ahead what it can while its lease goes on. Return ``{}`` or ``{"failed": why}``."""
        return await _tried(self._engine.moving.send_ahead(lease_id, WorkerAddress(**to)))

    async def send(self, lease_id: str, to: dict[str, Any]) -> dict[str, Any]:
        """Let a worker send its lease to another server's. Return ``{"bytes", "rest_s"}``, or ``{"failed": why}``."""
        try:
            sent = await self._engine.moving.send(lease_id, WorkerAddress(**to))
        except EngineError as e:
            return {"failed": str(e)}
        return {"bytes": sent.nbytes, "rest_s": sent.rest_s}

    async def introduce(self, lease_id: str, others: dict[str, dict[str, Any]]) -> dict[str, str]:
        """Let a worker be linked to those of its lease on other servers. Return ``{}`` or ``{"failed": why}``.

        ``others``: their addresses, by their names.
        """
        addresses = {peer: WorkerAddress(**address) for peer, address in others.items()}
        try:
            await self._engine.introduce(lease_id, addresses)
        except EngineError as e:
            return {"failed": str(e)}
        return {}

    async def stay(self, lease_id: str) -> dict[str, str]:
        """Let a lease that was sent go on here. Return ``{}`` or ``{"failed": why}``."""
        return await _tried(self._engine.moving.stay(lease_id))

    async def serve(self, lease_id: str) -> dict[str, str]:
        """Let a lease that has arrived go on here. Return ``{}`` or ``{"failed": why}``."""
        return await _tried(self._engine.serve_arrived(lease_id))

    async def leave(self, lease_id: str, to: dict[str, Any]) -> None:
        """End the worker of a lease that goes on at another server's; return when it has ended."""
        await self._engine.moving.leave(lease_id, WorkerAddress(**to))
        self._workers.pop(lease_id, None)

    async def stop(self, lease_id: str) -> None:
        """Stop the worker of a lease; return when it has ended."""
        await self._engine.stop_worker(lease_id)

    async def limit(self, lease_id: str, limits: dict[str, int]) -> dict[str, str]:
        """Set the memory limits of a worker. Return ``{}``, ``{"in_use": why}`` or ``{"failed": why}``."""
        try:
            await self._engine.limit_worker(lease_id, limits)
        except SliceInUse as e:
            return {"in_use": str(e)}
        except EngineError as e:
            return {"failed": str(e)}
        return {}

    async def keep(self, lease_ids: list[str]) -> None:
        """End the workers of all other leases; return when they have ended."""
        others = [lease_id for lease_id in self._workers if lease_id not in lease_ids]
        await asyncio.gather(*(self._engine.stop_worker(lease_id) for lease_id in others))

    async def news(self, heard: int, wait_s: float) -> dict[str, Any]:
        """Return the events after number ``heard``, at the latest after ``wait_s`` seconds; forget those up to it.

        The answer is ``{"ended": [[number, lease, state, reason]], "replaced": [[number, lease, worker, reason]],
        "parking": {"arena_mib", "parked": [lease], "states": {lease: [MiB, whether it is clean]}}, "wanted": parked
        leases that need their GPUs, "usage": {lease: …}, "warm", "failure", "readings": of this machine's health,
        "clock": seconds since the epoch}``
        """
        for events in (self._ended, self._replaced):
            for number in [n for n in events if n <= heard]:
                del events[number]
        if not self._ended and not self._replaced and not self._wanted:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except (TimeoutError, asyncio.TimeoutError):
                pass
        wanted, self._wanted = self._wanted, set()
        return {
            "parking": self._parking(),
            "wanted": list(wanted),
            "ended": [[number, *end] for number, end in self._ended.items()],
            "replaced": [[number, *event] for number, event in self._replaced.items()],
            "usage": {lease_id: asdict(usage) for lease_id, usage in self._engine.usage().items()},
            "warm": self._engine.warm,
            "failure": self._engine.failure,
            "readings": [asdict(reading) for reading in self._engine.readings()],
            "clock": time.time(),
        }

    async def end(self) -> None:
        """End every worker and the processes that fork them."""
        await self._engine.stop()

    async def _start(self) -> None:
        await self._engine.start(self._on_exit)
        self._engine.on_replaced(self._on_replaced)
        await self._engine.adopt([])  # an agent that died here may have left state files

    def _on_wake(self, lease_id: str) -> None:
        self._wanted.add(lease_id)
        self._news.set()

    def _parking(self) -> dict[str, Any]:
        is_emulated = all(gpu.emulated for gpu in self._gpus())
        states = self._engine.states() if is_emulated else {}
        return {
            "arena_mib": sum(self._engine.arenas().values()) if is_emulated else 0,
            "parked": list(self._engine.parked()),
            "states": {lease_id: [one.used_mib, one.is_clean] for lease_id, one in states.items()},
        }

    def _on_exit(self, lease_id: str, state: LeaseState, reason: str) -> None:
        self._workers.pop(lease_id, None)
        self._seq += 1
        self._ended[self._seq] = (lease_id, state.value, reason)
        self._news.set()

    def _on_replaced(self, lease_id: str, worker: WorkerAddress, reason: str) -> None:
        self._workers[lease_id] = worker.to_json()
        self._seq += 1
        self._replaced[self._seq] = (lease_id, worker.to_json(), reason)
        self._news.set()

    def _gpus(self) -> tuple[GPU, ...]:
        given, count = self._settings, self._settings["gpus"]
        if given["emulate"] != "always":
            # Ray gives out no others; its numbers are those of nvidia-smi.
            real = tuple(gpu for gpu in nvml_gpus(given["name"]) if gpu.index < count)
            if real or given["emulate"] == "never":
                return real
        return emulated_gpus(given["name"], count, given["emulated_name"], given["emulated_memory_mib"])


async def _tried(call: Awaitable[None]) -> dict[str, str]:
    try:
        await call
    except EngineError as e:
        return {"failed": str(e)}
    return {}


def _lease(lease_id: str, slices: list[dict[str, Any]]) -> Lease:
    """A lease as far as its worker is parked and resumed."""
    return Lease(Request(lease_id, ""), LeaseState.ACTIVE, tuple(Slice(**piece) for piece in slices))
