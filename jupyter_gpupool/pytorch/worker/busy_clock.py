"""How long a device that works asynchronously was busy, from events at the end of what was submitted to it."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from .device import Event

#: With so many batches unfinished, the newest takes the place of the one before it.
_MAX_UNFINISHED = 1000


class BusyClock:
    """Adds up the seconds in which something that was submitted had not finished. Safe to use from several threads.

    All of it runs in one order, so that a batch begins when the one before has ended, or when it is submitted.
    ``now`` is the clock of those who submit, in seconds. Create it while the device has nothing to do.
    """

    def __init__(self, record: Callable[[], Event], now: Callable[[], float]) -> None:
        self._record = record
        self._now = now
        self._lock = threading.Lock()
        self._unfinished: collections.deque[tuple[Event, float]] = collections.deque()
        #: the last event that has run, and when that was; the device has nothing to do now
        self._last = (record(), now())
        self._seconds = 0.0
        self._reported = 0.0

    def submitted(self, began: float) -> None:
        """Note that a batch has been submitted, since ``began``."""
        event = self._record()
        with self._lock:
            if len(self._unfinished) >= _MAX_UNFINISHED:
                began = self._unfinished.pop()[1]
            self._unfinished.append((event, began))
            self._settle()

    def seconds(self) -> float:
        """The seconds until now. They never fall."""
        with self._lock:
            self._settle()
            total = self._seconds
            if self._unfinished:
                began = self._unfinished[0][1]
                total += max(0.0, self._now() - max(began, self._last[1]))
            self._reported = max(self._reported, total)
            return self._reported

    def _settle(self) -> None:
        """Add up what has finished."""
        while self._unfinished and self._unfinished[0][0].query():
            event, began = self._unfinished.popleft()
            last, last_s = self._last
            # When the batch ended on this clock: after the last event by the device's own clock.
            ended = min(self._now(), last_s + last.elapsed_time(event) / 1e3)
            self._seconds += max(0.0, ended - max(began, last_s))
            self._last = (event, max(ended, last_s))
