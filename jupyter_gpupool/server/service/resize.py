"""Resizes a lease and its worker, so that an interruption at any point loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

from jupyter_gpupool.core.engine import Engine
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.pool.manager import Manager

#: Calls a function on the manager's thread.
Call = Callable[..., Awaitable[Any]]


class Resizing:
    """Runs one resize of a lease at a time. ``call`` runs a function on the manager's thread; ``run`` also carries out
    the actions of its change."""

    def __init__(self, call: Call, run: Call) -> None:
        self._call = call
        self._run = run
        self._busy: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def resize(
        self,
        manager: Manager,
        engine: Engine,
        lease_id: str,
        owner: str | None,
        partial: float | None,
        memory_mib: int | None,
    ) -> Lease:
        """Resize a lease in an order in which no more is ever in use than is granted.

        1. The worker keeps to the smaller of both limits.
        2. The ledger changes.
        3. The worker may use the new limit.
        """
        async with self._busy.setdefault(lease_id, asyncio.Lock()):
            before = await self._call(manager.lease, lease_id, owner)
            after = await self._call(manager.resized, lease_id, partial, memory_mib, owner)
            now = {piece.gpu_uuid: piece.memory_mib for piece in before.slices}
            then = {piece.gpu_uuid: piece.memory_mib for piece in after}
            least = {uuid: min(mib, then[uuid]) for uuid, mib in now.items()}
            if least != now:
                await engine.limit_worker(lease_id, least)
            try:
                lease: Lease = await self._run(manager.resize, lease_id, partial, memory_mib, owner)
            except PoolError:
                if least != now:
                    await engine.limit_worker(lease_id, now)
                raise
            if least != then or now == then:  # a repeated resize: the worker may have missed the first one
                await engine.limit_worker(lease_id, then)
        return lease
