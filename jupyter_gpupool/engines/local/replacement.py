"""Gives a lease another worker on the same slices where the worker ended by what it computed.

The new one listens where the former did. What the former had in its memory is lost; its program keeps the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from logging import LoggerAdapter
from typing import Any

from jupyter_gpupool.core.engine import WorkerExit, WorkerReplaced
from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease, LeaseState, WorkerAddress

from .exit_codes import end_of, is_replaced

#: A lease whose workers ended so often within so many seconds gets no other one.
_MAX_ENDS = 20
_WITHIN_S = 60.0

#: Starts the worker of a lease, whose first slice has that number here, at that port. Raises EngineError.
Start = Callable[[Lease, int, int], Awaitable[WorkerAddress]]


class Replacements:
    """What each lease's worker was started with, and the workers that are being replaced."""

    def __init__(self, start: Start, log: Any) -> None:
        self._start = start
        self._log: LoggerAdapter[Any] = log
        #: called once another worker runs
        self.on_replaced: WorkerReplaced = lambda lease_id, worker, reason: None
        #: called where none could be started
        self.on_exit: WorkerExit = lambda lease_id, state, reason: None
        self._leases: dict[str, tuple[Lease, int]] = {}
        self._ends: dict[str, deque[float]] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def remember(self, lease: Lease, first: int = 0) -> None:
        """A worker has these slices; the first of them is the lease's slice number ``first``."""
        self._leases[lease.id] = lease, first

    def resize(self, lease_id: str, limits: Mapping[str, int]) -> Lease | None:
        """A worker keeps to so many MiB by GPU uuid. Return its lease with these slices; None if it is unknown."""
        known = self._leases.get(lease_id)
        if known is None:
            return None
        lease, first = known
        slices = (replace(s, memory_mib=limits.get(s.gpu_uuid, s.memory_mib)) for s in lease.slices)
        resized = replace(lease, slices=tuple(slices))
        self._leases[lease_id] = resized, first
        return resized

    def forget(self, lease_id: str) -> None:
        """The lease's worker has ended for good."""
        self._leases.pop(lease_id, None)
        self._ends.pop(lease_id, None)

    def begin(self, lease_id: str, worker: WorkerAddress, code: int | None) -> bool:
        """Start another worker in the background, if one is to take the place of that which has ended."""
        known = self._leases.get(lease_id)
        if known is None or not is_replaced(code):
            return False
        ends = self._ends.setdefault(lease_id, deque(maxlen=_MAX_ENDS))
        now = time.monotonic()
        if len(ends) == _MAX_ENDS and now - ends[0] < _WITHIN_S:
            return False
        ends.append(now)
        lease, first = known
        work = self._replace(lease, first, worker, end_of(code)[1])
        self._under_way[lease_id] = task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._under_way.pop(lease_id, None))
        return True

    async def until_done(self, lease_id: str) -> None:
        """Return when no worker of the lease is being replaced."""
        task = self._under_way.get(lease_id)
        if task is not None:
            await asyncio.wait([task])

    async def cancel_all(self) -> None:
        """Replace no worker any more."""
        for task in list(self._under_way.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _replace(self, lease: Lease, first: int, former: WorkerAddress, reason: str) -> None:
        self._log.warning("Lease %s gets another worker: %s", lease.id, reason)
        try:
            worker = await self._start(lease, first, former.port)
        except EngineError as e:
            self.forget(lease.id)
            self.on_exit(lease.id, LeaseState.LOST, f"{reason}, and no other one could be started: {e}")
        else:
            self.on_replaced(lease.id, worker, reason)
