"""Parks idle leases for others who wait, and wakes them: asks the manager what to do, and the engine to do it."""

from __future__ import annotations

import asyncio
import time

from jupyter_gpupool.core.engine import Engine, ParkingEngine
from jupyter_gpupool.core.errors import EngineError, PoolError
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.reclaim import Parks

from .manager_access import ManagerAccess

#: After a lease could not be parked, seconds until it is tried again.
_RETRY_S = 30.0


class Reclaiming:
    """Parks and wakes the leases of one pool, if its engine can."""

    def __init__(self, engine: Engine, access: ManagerAccess) -> None:
        self._engine = engine if isinstance(engine, ParkingEngine) else None
        self._access = access
        self._is_looking = False
        self._refused: dict[str, float] = {}  # leases that could not be parked, and when that was
        #: the leases that are being parked
        self.parking: set[str] = set()
        if self._engine is not None:
            self._engine.on_wake(lambda lease_id: self._access.spawn(self._wake(lease_id)))

    def parked(self) -> set[str]:
        """The leases whose state the engine has in host memory."""
        return set() if self._engine is None else set(self._engine.parked())

    def look(self) -> None:
        """See in the background whether leases are to be parked. Call it when a lease begins to wait, and often."""
        if self._engine is not None and not self._is_looking and self._engine.states():
            self._is_looking = True
            self._access.spawn(self._look(self._engine))

    async def _look(self, engine: ParkingEngine) -> None:
        try:
            manager = self._access.manager()
            if manager is None:
                return
            now = time.monotonic()
            self._refused = {id: at for id, at in self._refused.items() if now - at < _RETRY_S}
            parks = await self._access.call(
                manager.find_parks, engine.states(), engine.arenas(), set(self._refused)
            )
            if parks is not None:
                await self._park(engine, manager, parks)
        except PoolError as e:
            self._access.log.error("The pool cannot park leases for those that wait, and tries again: %s", e)
        finally:
            self._is_looking = False

    async def _park(self, engine: ParkingEngine, manager: Manager, parks: Parks) -> None:
        """Park all of these leases, or none."""
        ids = [lease.id for lease in parks.leases]
        self.parking.update(ids)
        try:
            kept = await asyncio.gather(*map(engine.park_worker, parks.leases), return_exceptions=True)
            done = [lease for lease, mib in zip(parks.leases, kept, strict=True) if isinstance(mib, int)]
            try:
                self._check(parks, kept)
                mib = {lease.id: mib for lease, mib in zip(parks.leases, kept, strict=True)}
                change = await self._access.run(manager.park, parks, mib)
            except PoolError as e:
                self._access.log.warning("No lease is parked for lease %s: %s", parks.waiting.id, e)
                await self._undo(engine, manager, done)
                return
            recorded = {lease.id for lease in change.changed if lease.state is LeaseState.PARKED}
            await self._undo(engine, manager, [lease for lease in done if lease.id not in recorded])
        finally:
            self.parking.difference_update(ids)

    def _check(self, parks: Parks, kept: list[int | BaseException]) -> None:
        """Raise the first error, and leave the leases that have one alone for a while."""
        first: BaseException | None = None
        for lease, mib in zip(parks.leases, kept, strict=True):
            if isinstance(mib, BaseException):
                self._refused[lease.id] = time.monotonic()
                first = first or mib
        if first is not None:
            raise first if isinstance(first, EngineError) else EngineError(repr(first)) from first

    async def _undo(self, engine: ParkingEngine, manager: Manager, leases: list[Lease]) -> None:
        """Resume leases that the ledger does not have as parked; they hold their slices still."""
        for lease in leases:
            now: Lease = await self._access.call(manager.lease, lease.id)
            if now.state is LeaseState.ACTIVE:
                try:
                    await engine.resume_worker(now)
                except EngineError as e:
                    await self._access.run(
                        manager.resume_failed, lease.id, f"its state could not be brought back: {e}"
                    )

    async def _wake(self, lease_id: str) -> None:
        manager = self._access.manager()
        if manager is None or lease_id in self.parking:
            return  # the engine asks again
        try:
            await self._access.run(manager.wake, lease_id)
        except PoolError as e:
            self._access.log.error("Lease %s cannot be woken yet: %s", lease_id, e)
