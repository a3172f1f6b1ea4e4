"""Waiting for connections, on systems without poll() too."""

from __future__ import annotations

import select
from typing import Any, Protocol

READABLE: int = getattr(select, "POLLIN", 1)
WRITABLE: int = getattr(select, "POLLOUT", 4)


class Poll(Protocol):
    """The part of :class:`select.poll` that this package uses."""

    def register(self, fd: Any, eventmask: int, /) -> None:
        """Wait for these events of a connection."""

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """Wait up to ``timeout`` milliseconds, and return descriptors with their events."""


class SelectPoll:
    """:class:`Poll` by ``select()``, which every system has. It cannot wait for descriptors above 1023 on Unix."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}

    def register(self, fd: Any, eventmask: int, /) -> None:
        self._masks[fd if isinstance(fd, int) else fd.fileno()] = eventmask

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        to_read = [fd for fd, mask in self._masks.items() if mask & READABLE]
        to_write = [fd for fd, mask in self._masks.items() if mask & WRITABLE]
        wait_s = None if timeout is None else timeout / 1000
        readable, writable, _ = select.select(to_read, to_write, [], wait_s)
        found = dict.fromkeys(readable, READABLE)
        for fd in writable:
            found[fd] = found.get(fd, 0) | WRITABLE
        return list(found.items())


def new_poll() -> Poll:
    """What waits fastest on this system."""
    return select.poll() if hasattr(select, "poll") else SelectPoll()
