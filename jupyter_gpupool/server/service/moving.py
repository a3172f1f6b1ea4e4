"""Moves leases to other GPU servers: one that a change of the ledger calls for, or all of a server that is drained."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jupyter_gpupool.core.engine import Engine, MovingEngine
from jupyter_gpupool.core.errors import EngineError, NotLeading, NotSupported, PoolError
from jupyter_gpupool.core.models import Change, Lease
from jupyter_gpupool.pool.manager import Manager

from .manager_access import ManagerAccess

#: How many leases of a drained server are moved at once: the network is shared, but each has pauses of its own.
_MOVES_AT_ONCE = 4
#: How often a lease that is being parked is looked at, in seconds.
_PARKING_POLL_S = 0.05
#: After a failed write to the ledger, seconds until the next attempt.
_RETRY_S = 1.0


@dataclass
class Move:
    """What becomes of one lease of a drained server. ``outcome``: waiting, moving, moved, stays or ended.

    ``to``: the server's name; ``reason``: why it stays; ``seconds``: how long the move took.
    """

    lease: str
    owner: str
    outcome: str = "waiting"
    to: str = ""
    reason: str = ""
    seconds: float | None = None


@dataclass
class Drain:
    """The moves of one server's leases, in their order; ``over`` once all are decided."""

    moves: list[Move] = field(default_factory=list)
    over: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"moves": [asdict(move) for move in self.moves], "over": self.over}


class Moving:
    """The moves of one pool, if its engine can move leases."""

    def __init__(self, engine: Engine, access: ManagerAccess) -> None:
        self._engine = engine if isinstance(engine, MovingEngine) else None
        self._access = access
        self._waiting: dict[str, asyncio.Future[str]] = {}  # for the ends of moves: why it stays, or nothing
        self._drains: dict[str, Drain] = {}
        self._is_making_room = False
        #: the leases that are being parked
        self.parking: set[str] = set()
        #: called with the seconds that each move took, or None for one that failed
        self.on_moved: Callable[[float | None], None] = lambda seconds: None

    @property
    def is_possible(self) -> bool:
        """Whether leases can be moved at all."""
        return self._engine is not None

    def arrived(self) -> set[str]:
        """The leases that the engine has found where they were to be moved, after a restart."""
        return set() if self._engine is None else set(self._engine.arrived())

    async def carry_out(self, lease: Lease) -> None:
        """Move a lease to where the ledger says, and record how that ended."""
        while lease.id in self.parking:  # one call about a lease at a time
            await asyncio.sleep(_PARKING_POLL_S)
        began, manager = time.monotonic(), self._access.manager()
        if manager is None:
            raise PoolError("the pool is not running")
        why = ""
        try:
            if self._engine is None:
                raise EngineError("this engine cannot move leases")
            worker = await self._engine.move_worker(lease)
        except Exception as e:  # whatever it was, the ledger must not wait for this move for ever
            why = str(e) or type(e).__name__
            unforeseen = None if isinstance(e, EngineError) else e
            self._access.log.warning("Lease %s stays where it is: %s", lease.id, why, exc_info=unforeseen)
            await self._record(manager.move_failed, lease.id, why)
            self.on_moved(None)
        else:
            seconds = time.monotonic() - began
            await self._record(manager.moved, lease.id, worker, f"in {seconds:.1f} s")
            self.on_moved(seconds)
        waiting = self._waiting.pop(lease.id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(why)

    async def _record(self, function: Callable[..., Change], *args: Any) -> None:
        while True:
            try:
                await self._access.run(function, *args)
            except NotLeading:
                return  # the leader finds it where it is
            except PoolError as e:
                self._access.log.error("A move cannot be recorded yet: %s", e)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    # -- for those that wait

    def make_room(self) -> None:
        """Move leases in the background where that lets a request start. Call it when one waits, and often."""
        manager = self._access.manager()
        if self._engine is not None and manager is not None and not self._is_making_room:
            self._is_making_room = True
            self._access.spawn(self._make_room(manager))

    async def _make_room(self, manager: Manager) -> None:
        try:
            await self._access.run(manager.make_room)
        except PoolError as e:
            self._access.log.error("The pool cannot move leases for those that wait, and tries again: %s", e)
        finally:
            self._is_making_room = False

    # -- a whole server

    def check(self) -> None:
        """Raise NotSupported if leases cannot be moved."""
        if self._engine is None:
            raise NotSupported(
                "this pool's engine cannot move leases: it has one GPU server; drain it without --move"
            )

    def progress(self, server: str) -> Drain:
        """Return how far the moves from a server are; without any, they are over."""
        return self._drains.get(server) or Drain(over=True)

    async def leave(self, manager: Manager, server: str) -> Drain:
        """Begin to move all leases of a server elsewhere, unless that is under way. Return their moves."""
        self.check()
        known = self._drains.get(server)
        if known is not None and not known.over:
            return known
        leases = await self._access.call(manager.leases_on, server)
        drain = self._drains[server] = Drain([Move(lease.id, lease.request.owner) for lease in leases])
        self._access.spawn(self._leave(manager, server, drain))
        return drain

    async def _leave(self, manager: Manager, server: str, drain: Drain) -> None:
        at_once = asyncio.Semaphore(_MOVES_AT_ONCE)

        async def step(move: Move) -> None:
            async with at_once:
                await self._step(manager, server, move)

        try:
            await asyncio.gather(*map(step, drain.moves))
        finally:
            drain.over = True

    async def _step(self, manager: Manager, server: str, move: Move) -> None:
        began = time.monotonic()
        over = self._waiting[move.lease] = asyncio.get_running_loop().create_future()
        move.outcome = "moving"
        try:
            change = await self._access.run(
                manager.move, move.lease, f"because {server} is drained", "", server
            )
            assert change.lease is not None, "it is being moved"
            move.to = change.lease.arriving[0].server
            move.reason = await over
        except PoolError as e:
            self._waiting.pop(move.lease, None)
            move.reason = str(e)
        now: Lease = await self._access.call(manager.lease, move.lease)
        if now.state.ended:
            move.outcome, move.reason = "ended", now.reason
        elif move.reason:
            move.outcome = "stays"
        else:
            move.outcome, move.seconds = "moved", round(time.monotonic() - began, 3)
