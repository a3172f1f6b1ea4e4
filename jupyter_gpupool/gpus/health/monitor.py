"""A thread that reads this machine's health periodically, so that no caller waits for a driver."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from jupyter_gpupool.core.readings import ServerReading

from .nvml_reader import Errors

log = logging.getLogger(__name__)

#: How often a machine is read, in seconds; an error of the driver triggers a reading at once.
EVERY_S = 10.0
#: How long the thread may take to notice that it must end, in seconds.
_STOP_CHECK_S = 1.0

Xids = Mapping[str, Sequence[tuple[int, float]]]


class Watch:
    """Calls ``read``, with the errors that the driver has reported, every ``every_s`` seconds.

    ``latest``: the last reading, None before the first one. It becomes stale if the driver hangs.
    """

    def __init__(self, read: Callable[[Xids], ServerReading], every_s: float = EVERY_S) -> None:
        self._read = read
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpupool-health", daemon=True)
        self.latest: ServerReading | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread without waiting for it: it may hang in the driver, and is a daemon thread."""
        self._over.set()

    def _run(self) -> None:
        errors = Errors()
        listening = errors.open()
        try:
            while not self._over.is_set():
                try:
                    self.latest = self._read(errors.seen)
                except Exception:  # a failure shows in the age of the last reading
                    log.exception("This machine's health cannot be read")
                until = time.monotonic() + self._every_s
                while not self._over.is_set() and (left := until - time.monotonic()) > 0:
                    if not listening:
                        self._over.wait(left)
                        continue
                    try:
                        if errors.wait(min(left, _STOP_CHECK_S)):
                            break
                    except Exception as error:
                        log.warning("Errors of the NVIDIA driver cannot be received any more: %s", error)
                        listening = False
        finally:
            errors.close()
