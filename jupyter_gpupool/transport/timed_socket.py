"""A socket with a timeout that asks the system once for a call. Python's own asks first whether it may."""

from __future__ import annotations

import socket
from typing import Any

from .polling import READABLE, WRITABLE, new_poll


class TimedSocket(socket.socket):
    """Takes over the connection of ``sock``, and its timeout. Where a call would wait, it waits so long at most."""

    def __init__(self, sock: socket.socket) -> None:
        self._timeout_s = sock.gettimeout()
        super().__init__(fileno=sock.detach())
        self.setblocking(False)

    def settimeout(self, value: float | None) -> None:
        """Let calls wait up to ``value`` seconds; None: as long as it takes."""
        self._timeout_s = value

    def gettimeout(self) -> float | None:
        """How long calls may wait, in seconds."""
        return self._timeout_s

    def send(self, data: Any, flags: int = 0) -> int:
        """Send some of the bytes, and return how many. Raises OSError."""
        while True:
            try:
                return super().send(data, flags)
            except BlockingIOError:
                self._wait(WRITABLE)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Read what has arrived, and return how many bytes; 0 at the end. Raises OSError."""
        while True:
            try:
                return super().recv_into(buffer, nbytes, flags)
            except BlockingIOError:
                self._wait(READABLE)

    def _wait(self, event: int) -> None:
        poll = new_poll()
        poll.register(self, event)
        if not poll.poll(None if self._timeout_s is None else self._timeout_s * 1000):
            raise TimeoutError("timed out")
