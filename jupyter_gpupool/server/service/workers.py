"""Starts and stops the workers that a change of the ledger calls for, and records how workers end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from jupyter_gpupool.core.engine import Engine, ParkingEngine
from jupyter_gpupool.core.errors import EngineError, NotLeading, PoolError
from jupyter_gpupool.core.models import (
    Change,
    Lease,
    LeaseState,
    MoveWorker,
    ResumeWorker,
    StartWorker,
    StopWorker,
    WorkerAddress,
)
from jupyter_gpupool.pool.manager import Manager

from . import traces

#: After a failed write to the ledger, seconds until the next attempt.
_RETRY_S = 1.0


class Workers:
    """The workers of one pool.

    ``run`` makes a change on the manager's thread and carries out its actions; ``manager`` returns the manager, or
    None while there is none; ``spawn`` runs a coroutine in the background; ``move`` moves a lease to another server.
    """

    def __init__(
        self,
        engine: Engine,
        run: Callable[..., Awaitable[Change]],
        manager: Callable[[], Manager | None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        move: Callable[[Lease], Coroutine[Any, Any, None]],
        log: Any,
    ) -> None:
        self._move = move
        self._engine = engine
        self._run = run
        self._manager = manager
        self._spawn = spawn
        self._log = log
        #: called with the seconds from a program's need of its GPUs until it had them again
        self.on_resumed: Callable[[float], None] = lambda seconds: None

    def carry_out(self, change: Change) -> None:
        """Stop and start workers in the background, in that order."""
        if change.actions:
            self._spawn(self._carry_out(change))

    def ended(self, lease_id: str, state: LeaseState, reason: str) -> None:
        """Record, in the background, that a worker ended by itself."""
        manager = self._manager()
        if manager is not None:
            self._spawn(self._record(lease_id, manager.worker_exited, lease_id, state, reason))

    def replaced(self, lease_id: str, worker: WorkerAddress, reason: str) -> None:
        """Record, in the background, that another worker has taken the place of one that ended by itself."""
        manager = self._manager()
        if manager is not None:
            self._spawn(self._record(lease_id, manager.worker_replaced, lease_id, worker, reason))

    async def _carry_out(self, change: Change) -> None:
        for action in change.actions:
            if isinstance(action, StopWorker):
                await self._engine.stop_worker(action.lease_id)
        starts = [action.lease for action in change.actions if isinstance(action, StartWorker)]
        resumes = [action for action in change.actions if isinstance(action, ResumeWorker)]
        for action in change.actions:
            if isinstance(action, MoveWorker):
                self._spawn(self._move(action.lease))
        if len(starts) == 1 and not resumes:  # nearly always, and a task less for each grant
            await self._start(starts[0])
        else:
            await asyncio.gather(*map(self._resume, resumes), *map(self._start, starts))

    async def _start(self, lease: Lease) -> None:
        manager = self._manager()
        if manager is None:
            raise PoolError("the pool is not running")
        try:
            with traces.current.starting(lease):
                worker = await self._engine.start_worker(lease)
        except EngineError as e:
            await self._run(manager.worker_failed, lease.id, str(e))
            return
        try:
            await self._run(manager.worker_started, lease.id, worker)
        except PoolError as e:
            # A worker that is not in the ledger must not compute.
            self._log.error("The worker of lease %s cannot be recorded, so it is stopped: %s", lease.id, e)
            await self._engine.stop_worker(lease.id)

    async def _resume(self, action: ResumeWorker) -> None:
        manager, lease = self._manager(), action.lease
        if manager is None or not isinstance(self._engine, ParkingEngine):
            raise PoolError("the pool is not running")
        try:
            worker = await self._engine.resume_worker(lease)
        except EngineError as e:
            why = f"its state could not be brought back: {e}"
            await self._run(manager.resume_failed, lease.id, why)
            return
        if action.woken_at is not None:
            self.on_resumed(max(0.0, time.time() - action.woken_at))
        if worker != lease.worker:
            await self._run(manager.worker_started, lease.id, worker)

    async def _record(self, lease_id: str, change: Callable[..., Change], *args: Any) -> None:
        while True:
            try:
                await self._run(change, *args)
            except NotLeading:
                return  # the leader sees it, too
            except PoolError as e:
                self._log.error("The end of the worker of lease %s cannot be recorded yet: %s", lease_id, e)
                await asyncio.sleep(_RETRY_S)
            else:
                return
