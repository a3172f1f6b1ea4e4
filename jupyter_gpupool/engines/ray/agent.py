"""The Ray actor on each GPU server: it keeps a warm parent there, which forks the workers.

The pool and the actor exchange plain dictionaries. As a detached actor it outlives a pool that is killed, and records
how workers ended until a pool has read it. When the actor ends, its workers end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from jupyter_gpupool.core.errors import EngineError, SliceInUse
from jupyter_gpupool.core.models import GPU, Lease, LeaseState, Request, Slice
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
        self._seq = 0
        self._news = asyncio.Event()
        self._workers: dict[str, dict[str, Any]] = {}

    async def describe(self) -> dict[str, Any]:
        """Return the server's name, its GPUs, the running workers, and the ends of workers that no pool has read.

        The answer is ``{"name", "gpus", "workers": {lease: …}, "ended": {lease: [state, reason]}}``, or
        ``{"failed": why}``.
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
        }

    async def warm(self) -> None:
        """Return when the next worker can start at once, or cannot be started."""
        with contextlib.suppress(EngineError):
            await self._engine.until_warm()

    async def start(
        self, lease_id: str, secret_sha256: str, slices: list[dict[str, Any]], ttl_s: float, first: int = 0
    ) -> dict[str, Any]:
        """Start a worker. Return its ``{"host", "port", "pid", "created"}``, or ``{"failed": why}``.

        ``first``: the number of the first of these slices within the lease.
        """
        request = Request(lease_id, "", secret_sha256=secret_sha256)
        pieces = tuple(Slice(**piece) for piece in slices)
        try:
            lease = Lease(request, LeaseState.GRANTED, pieces, ttl_s=ttl_s)
            worker = await self._engine.start_worker(lease, first)
        except EngineError as e:
            return {"failed": str(e)}
        self._workers[lease_id] = worker.to_json()
        return self._workers[lease_id]

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

        The answer is ``{"ended": [[number, lease, state, reason]], "usage": {lease: …}, "warm", "failure",
        "readings": of this machine's health, "clock": seconds since the epoch}``
        """
        for number in [n for n in self._ended if n <= heard]:
            del self._ended[number]
        if not self._ended:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except (TimeoutError, asyncio.TimeoutError):
                pass
        return {
            "ended": [[number, *end] for number, end in self._ended.items()],
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
        await self._engine.adopt([])  # an agent that died here may have left state files

    def _on_exit(self, lease_id: str, state: LeaseState, reason: str) -> None:
        self._workers.pop(lease_id, None)
        self._seq += 1
        self._ended[self._seq] = (lease_id, state.value, reason)
        self._news.set()

    def _gpus(self) -> tuple[GPU, ...]:
        given, count = self._settings, self._settings["gpus"]
        if given["emulate"] != "always":
            # Ray gives out no others; its numbers are those of nvidia-smi.
            real = tuple(gpu for gpu in nvml_gpus(given["name"]) if gpu.index < count)
            if real or given["emulate"] == "never":
                return real
        return emulated_gpus(given["name"], count, given["emulated_name"], given["emulated_memory_mib"])
