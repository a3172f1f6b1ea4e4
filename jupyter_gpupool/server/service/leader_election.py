"""Elects one leader among several daemons on one ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from jupyter_gpupool.core.errors import NotLeading, PoolError
from jupyter_gpupool.pool.ledger.leader_lock import Leadership

#: Seconds between two attempts to take the lead, or two checks that this daemon still leads.
_CHECK_INTERVAL_S = 0.5
#: Seconds that a daemon leaves the lead to others after it took the lead and failed.
_RETRY_S = 5.0


class LeaderElection:
    """``lead`` adopts the ledger's leases, or raises PoolError; ``follow`` undoes it."""

    def __init__(
        self,
        leadership: Leadership,
        lead: Callable[[], Awaitable[None]],
        follow: Callable[[], Awaitable[None]],
        log: Any,
    ) -> None:
        self._leadership = leadership
        self._lead = lead
        self._follow = follow
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self.leading = False

    async def start(self) -> None:
        """Return when it is decided whether this daemon leads for now."""
        await self._look()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Give up the lead. Call it after the service's last change."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.leading = False
        await asyncio.to_thread(self._leadership.give_up)

    def check(self) -> None:
        """Raise NotLeading, with the leader's address, unless this daemon leads."""
        if not self.leading:
            leader = self._leadership.leader
            where = f"the one at {leader} does" if leader else "another one is about to"
            raise NotLeading(f"this server does not lead the pool, {where}; try again, or ask that one")

    @property
    def leader(self) -> str:
        """The leader's address; empty while there is none."""
        return self._leadership.leader

    async def _look(self) -> None:
        if self.leading:
            if not await asyncio.to_thread(self._leadership.keep):
                self._log.error("This server has lost the lead; it follows")
                self.leading = False
                await self._follow()
            return
        if await asyncio.to_thread(self._leadership.take):
            try:
                await self._lead()
            except BaseException:
                await asyncio.to_thread(self._leadership.give_up)
                await self._follow()
                raise
            self.leading = True
            self._log.info("This server leads")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            try:
                await self._look()
            except PoolError as e:
                self._log.error("This server cannot lead: %s", e)
                await asyncio.sleep(_RETRY_S)
