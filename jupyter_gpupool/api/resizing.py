"""How a lease and its worker get another share of their GPUs, with nothing lost wherever it is interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

from ..pool.errors import PoolError
from ..pool.interfaces import Engine
from ..pool.manager import Manager
from ..pool.models import Lease

#: Calls a function on the manager's thread.
Call = Callable[..., Awaitable[Any]]


class Resizing:
    """One resize of a lease at a time. ``call`` asks the manager; ``run`` carries out what follows, too."""

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
        """The worker keeps to the smaller share first, then the ledger changes, then it may use the larger one:
        at no instant is there more in use than is granted."""
        async with self._busy.setdefault(lease_id, asyncio.Lock()):
            before = await self._call(manager.lease, lease_id, owner)
            after = await self._call(manager.resized, lease_id, partial, memory_mib, owner)
            now = {piece.gpu_uuid: piece.memory_mib for piece in before.slices}
            then = {piece.gpu_uuid: piece.memory_mib for piece in after}
            least = {uuid: min(mib, then[uuid]) for uuid, mib in now.items()}
            if least != now:
                await engine.limit_worker(lease_id, least)
            try:
                lease = await self._run(manager.resize, lease_id, partial, memory_mib, owner)
            except PoolError:
                if least != now:
                    await engine.limit_worker(lease_id, now)
                raise
            if least != then or now == then:  # repeated: perhaps the worker did not hear it
                await engine.limit_worker(lease_id, then)
        return lease
