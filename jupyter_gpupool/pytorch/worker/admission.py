"""Whether clients are let in: not while the lease is on its way to another worker, or has not arrived here yet."""

from __future__ import annotations

import threading
from types import TracebackType

from jupyter_gpupool.transport.handshake import MovedAway


class Admission:
    """A context in which a client is let in, from its hello until it is known. Entering it waits while it is closed,
    and raises MovedAway once the lease goes on elsewhere."""

    def __init__(self, is_open: bool) -> None:
        self._changed = threading.Condition()
        self._is_open = is_open
        self._inside = 0
        self._moved: tuple[str, int] | None = None

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_open or self._moved is not None)
            if self._moved is not None:
                raise MovedAway(*self._moved)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Let nobody in, and wait until nobody is about to be. False, and open again, if that takes too long."""
        with self._changed:
            self._is_open = False
            if self._changed.wait_for(lambda: not self._inside, timeout_s):
                return True
            self._is_open = True
            self._changed.notify_all()
            return False

    def open(self) -> None:
        """Let clients in, also those that wait."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def redirect(self, host: str, port: int) -> None:
        """Send clients to another worker from now on."""
        with self._changed:
            self._moved = (host, port)
            self._changed.notify_all()
