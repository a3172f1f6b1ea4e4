"""A lock that tells when a thread has to wait for it."""

from __future__ import annotations

import threading


class WatchedLock:
    """``asked`` is set once a thread asks for it that another one keeps out."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.asked.set()
            self._lock.acquire()

    def __exit__(self, *args: object) -> None:
        self._lock.release()
