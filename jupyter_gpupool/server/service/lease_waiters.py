"""Wakes the calls that wait for a change of one lease."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from jupyter_gpupool.core.models import Change


class Waiters:
    """Events by lease. Use it in the event loop's thread only."""

    def __init__(self) -> None:
        self._events: dict[str, set[asyncio.Event]] = {}  # by lease id
        self._positions: Mapping[str, int] = {}  # in the queue, as last notified

    @contextmanager
    def of(self, lease_id: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set when the lease changes. Clear it before reading the lease again."""
        event = asyncio.Event()
        self._events.setdefault(lease_id, set()).add(event)
        try:
            yield event
        finally:
            self._events[lease_id].discard(event)
            if not self._events[lease_id]:
                del self._events[lease_id]

    def notify(self, change: Change) -> None:
        """Wake the calls whose lease has changed, or has moved in the queue."""
        self._wake(lease.id for lease in change.changed)
        if change.positions is not None and change.positions != self._positions:
            moved = change.positions.items() ^ self._positions.items()
            self._positions = change.positions
            self._wake(lease_id for lease_id, _ in moved)

    def wake_all(self) -> None:
        """Wake every call that waits."""
        self._wake(list(self._events))

    def _wake(self, lease_ids: Iterable[str]) -> None:
        for lease_id in lease_ids:
            for event in self._events.get(lease_id, ()):
                event.set()
