"""Of several daemons on one ledger: has a service lead when it can, and follow when another one does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from ..pool.errors import NotLeading, PoolError
from ..pool.leadership import Leadership

#: How often one that follows asks for the lead, and one that leads whether it still does, in seconds.
_EVERY_S = 0.5
#: How long one that took the lead and failed leaves it to others, in seconds.
_PAUSE_S = 5.0


class Contender:
    """``lead`` takes up the ledger and raises PoolError where it cannot; ``follow`` undoes it."""

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
        self._task: asyncio.Task | None = None
        self.leading = False

    async def start(self) -> None:
        """Returns when it is known whether this one leads for now."""
        await self._look()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Let another one lead. After the service's own last change."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.leading = False
        await asyncio.to_thread(self._leadership.give_up)

    def check(self) -> None:
        """Raises NotLeading, with where to ask instead."""
        if not self.leading:
            leader = self._leadership.leader
            where = f"the one at {leader} does" if leader else "another one is about to"
            raise NotLeading(f"this server does not lead the pool, {where}; ask again, or ask that one")

    @property
    def leader(self) -> str:
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
            await asyncio.sleep(_EVERY_S)
            try:
                await self._look()
            except PoolError as e:
                self._log.error("This server cannot lead: %s", e)
                await asyncio.sleep(_PAUSE_S)
