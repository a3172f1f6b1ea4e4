"""Reads this machine again and again on a thread of its own, so that nobody waits for a driver."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from .readings import ServerReading
from .vitals import Errors

log = logging.getLogger(__name__)

#: How often a machine is read, in seconds; an error that the driver reports is read at once.
EVERY_S = 10.0
#: How long the thread may take to notice that it is to end.
_BEAT_S = 1.0

Xids = Mapping[str, Sequence[tuple[int, float]]]


class Watch:
    """Calls ``read`` (with the errors that the driver has reported) every ``every_s`` seconds. ``latest`` is what it
    said last, None before the first time; a driver that hangs lets it grow old."""

    def __init__(self, read: Callable[[Xids], ServerReading], every_s: float = EVERY_S) -> None:
        self._read = read
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpupool-health", daemon=True)
        self.latest: ServerReading | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Does not wait: the thread may be within the driver, and ends with the process at the latest."""
        self._over.set()

    def _run(self) -> None:
        errors = Errors()
        listening = errors.open()
        try:
            while not self._over.is_set():
                try:
                    self.latest = self._read(errors.seen)
                except Exception:  # one that cannot be read is noticed by its age
                    log.exception("This machine's health cannot be read")
                until = time.monotonic() + self._every_s
                while not self._over.is_set() and (left := until - time.monotonic()) > 0:
                    if not listening:
                        self._over.wait(left)
                        continue
                    try:
                        if errors.wait(min(left, _BEAT_S)):
                            break
                    except Exception as error:
                        log.warning("The NVIDIA driver's errors cannot be heard any more: %s", error)
                        listening = False
        finally:
            errors.close()
