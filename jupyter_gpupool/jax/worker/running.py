"""For how long slices compute: a program goes on after the command that has started it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any, Protocol

#: How often a program that runs is looked at, in seconds.
_LOOK_S = 0.05


class Counts(Protocol):
    """A slice whose time is counted."""

    busy_s: float


class Running:
    """Adds the time in which programs run to their slices, while it passes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = threading.Event()
        self._is_over = False
        self._thread: threading.Thread | None = None
        #: by slice: an array that the newest program computes, and until when its time has been counted
        self._unfinished: dict[Counts, tuple[Any, float]] = {}

    def note(self, slices: Iterable[Counts], array: Any, began: float) -> None:
        """A program that computes ``array`` was started at ``began``, by time.perf_counter; None: it has run."""
        now = time.perf_counter()
        has_run = array is None or _is_ready(array)
        with self._lock:
            for one in slices:
                known = self._unfinished.get(one)
                if has_run:
                    if known is None:  # else its time is counted
                        one.busy_s += now - began
                    continue
                self._unfinished[one] = (array, began if known is None else known[1])
        if not has_run and not self._begun.is_set():
            self._begun.set()
            self._start()

    def close(self) -> None:
        """End."""
        self._is_over = True
        self._begun.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._count, name="running", daemon=True)
                self._thread.start()

    def _count(self) -> None:
        while not self._is_over:
            self._begun.wait()
            with self._lock:
                now = time.perf_counter()
                for one, (array, counted) in list(self._unfinished.items()):
                    one.busy_s += now - counted
                    if _is_ready(array):
                        del self._unfinished[one]
                    else:
                        self._unfinished[one] = (array, now)
                if not self._unfinished and not self._is_over:
                    self._begun.clear()
                    continue
            time.sleep(_LOOK_S)


def _is_ready(array: Any) -> bool:
    try:
        return bool(array.is_ready())
    except (RuntimeError, ValueError):  # it has been donated, to a program that was noted since
        return True
