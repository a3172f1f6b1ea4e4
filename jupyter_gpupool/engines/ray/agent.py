"""What runs on each GPU server: a Ray actor that keeps a warm parent there and has it fork the workers.

The pool talks to it in plain dictionaries. It outlives a pool that is killed (then it is a detached actor)
and remembers how workers ended until a pool has heard of it. When it ends, its workers end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...devices.emulated import emulated_gpus
from ...devices.nvml import nvml_gpus
from ...pool.errors import EngineFailure, InUse
from ...pool.models import GPU, Lease, LeaseState, Request, Slice
from ..local import LocalEngine


class Agent:
    """``settings``: ``name`` and ``host`` of this server, ``gpus`` (how many Ray counts here), ``emulate``,
    ``emulated_name``, ``emulated_memory_mib``, and ``local``: the traits of the LocalEngine of this server."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._engine = LocalEngine(**settings["local"])
        self._started: asyncio.Future[None] | None = None
        self._ended: dict[int, tuple[str, str, str]] = {}
        self._seq = 0
        self._news = asyncio.Event()
        self._workers: dict[str, dict[str, Any]] = {}

    async def describe(self) -> dict[str, Any]:
        """Who this is, what GPUs there are, which workers run, and how others ended of which no pool has heard:
        ``{"name", "gpus", "workers": {lease: …}, "ended": {lease: [state, reason]}}``."""
        if self._started is None:
            self._started = asyncio.ensure_future(self._start())
        try:
            await asyncio.shield(self._started)
        except EngineFailure as e:
            self._started = None
            return {"failed": str(e)}
        return {
            "name": self._settings["name"],
            "gpus": [asdict(gpu) for gpu in self._gpus()],
            "workers": dict(self._workers),
            "ended": {lease_id: [state, reason] for lease_id, state, reason in self._ended.values()},
        }

    async def warm(self) -> None:
        """Returns when the next worker starts at once, or cannot be started."""
        with contextlib.suppress(EngineFailure):
            await self._engine.until_warm()

    async def start(
        self, lease_id: str, secret_sha256: str, slices: list[dict], ttl_s: float, first: int = 0
    ) -> dict[str, Any]:
        """The new worker's ``{"host", "port", "pid", "created"}``, or ``{"failed": why}``. ``first``: the number of
        the first of these slices within the lease."""
        request = Request(lease_id, "", secret_sha256=secret_sha256)
        pieces = tuple(Slice(**piece) for piece in slices)
        try:
            lease = Lease(request, LeaseState.GRANTED, pieces, ttl_s=ttl_s)
            worker = await self._engine.start_worker(lease, first)
        except EngineFailure as e:
            return {"failed": str(e)}
        self._workers[lease_id] = worker.to_json()
        return self._workers[lease_id]

    async def stop(self, lease_id: str) -> None:
        """Returns when that worker is gone."""
        await self._engine.stop_worker(lease_id)

    async def limit(self, lease_id: str, limits: dict[str, int]) -> dict[str, str]:
        """``{}``, ``{"in_use": why}`` or ``{"failed": why}``."""
        try:
            await self._engine.limit_worker(lease_id, limits)
        except InUse as e:
            return {"in_use": str(e)}
        except EngineFailure as e:
            return {"failed": str(e)}
        return {}

    async def keep(self, lease_ids: list[str]) -> None:
        """End the workers of all other leases; returns when they are gone."""
        others = [lease_id for lease_id in self._workers if lease_id not in lease_ids]
        await asyncio.gather(*(self._engine.stop_worker(lease_id) for lease_id in others))

    async def news(self, heard: int, wait_s: float) -> dict[str, Any]:
        """What has happened after number ``heard``, at the latest after ``wait_s``; that and older is forgotten.

        ``{"ended": [[number, lease, state, reason]], "usage": {lease: …}, "warm", "failure",
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
        """End every worker and what they are forked from."""
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
