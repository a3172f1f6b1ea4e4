"""Asks workers for something, each in a task of its own: one that does not answer holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from logging import LoggerAdapter
from typing import Any


class WorkerTasks:
    """At most one task for each lease."""

    def __init__(self, log: Any) -> None:
        self._log: LoggerAdapter[Any] = log
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, lease_id: str, work: Callable[[str], Awaitable[None]]) -> None:
        """Do this for a lease, unless its last task is not done."""
        if lease_id not in self._tasks:
            self._tasks[lease_id] = asyncio.get_running_loop().create_task(self._run(lease_id, work))

    async def _run(self, lease_id: str, work: Callable[[str], Awaitable[None]]) -> None:
        try:
            await work(lease_id)
        except Exception:  # the next time may be better
            self._log.exception("The worker of lease %s could not be looked after", lease_id)
        finally:
            del self._tasks[lease_id]

    async def stop(self) -> None:
        """Cancel what is not done; returns when nothing is left."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()  # those that had not begun
