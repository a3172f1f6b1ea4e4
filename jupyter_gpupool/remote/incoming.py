"""A session's frames in order, read ahead while one of them keeps the worker busy: copies travel while operators run.

Operators are always executed by the same thread; a second one only reads, and only after a while.
"""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import wire
from .memory import host_bytes
from .program import BadRecord
from .tls import Connection, readable

#: How long a frame is executed before others are read meanwhile, in seconds.
_PATIENCE_S = 0.001
#: The most frames that wait, and the most bytes of theirs; what is larger is read in its turn.
_MOST = 64
_MOST_BYTES = 256 << 20


class Frame(NamedTuple):
    """``payload`` is None where it is still to be read from the connection."""

    kind: wire.Kind
    header: Any
    length: int
    payload: torch.Tensor | None


class Incoming:
    """``limit``: the longest payload that is taken, in bytes."""

    def __init__(self, sock: Connection, limit: int) -> None:
        self._sock = sock
        self._limit = limit
        self._reading = threading.Lock()
        self._ahead: collections.deque[Frame | Exception] = collections.deque()
        self._held = 0
        self._busy = threading.Event()
        self._over = False
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._reader = threading.Thread(target=self._read_ahead, name="ahead", daemon=True)
        self._reader.start()

    def next(self) -> Frame:
        """Raises what wire.receive does, and BadRecord for a payload that is too long."""
        with self._reading:
            if not self._ahead:
                kind, header, length = wire.receive(self._sock)
                self._check(length)
                return Frame(kind, header, length, None)
            frame = self._ahead.popleft()
        if isinstance(frame, Exception):
            raise frame
        if frame.payload is not None:
            self._held -= frame.length
        return frame

    @contextlib.contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Within, what comes next may be read. Not for a frame whose payload is still in the connection."""
        self._busy.set()
        try:
            yield
        finally:
            self._busy.clear()

    def close(self) -> None:
        """The connection has been shut down, or is about to be."""
        self._over = True
        self._busy.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        self._reader.join()

    def _check(self, length: int) -> None:
        if length > self._limit:
            raise BadRecord(f"an upload of {length} bytes to a slice of {self._limit}")

    def _read_ahead(self) -> None:
        pause = threading.Event()
        while not self._over:
            self._busy.wait()
            pause.wait(_PATIENCE_S)
            while self._busy.is_set() and not self._over and len(self._ahead) < _MOST:
                if readable(self._sock, self._poll, 5) and not self._read_one():
                    break

    def _read_one(self) -> bool:
        """False when there is no more to be read for now."""
        with self._reading:
            if not self._busy.is_set() or not readable(self._sock, self._poll, 0):
                return False
            last = self._ahead[-1] if self._ahead else None
            if isinstance(last, Exception) or (last is not None and last.payload is None):
                return False  # nothing, or that frame's payload, is next in the connection
            try:
                kind, header, length = wire.receive(self._sock)
                self._check(length)
                payload = None
                if self._held + length <= _MOST_BYTES:
                    payload = torch.empty(length, dtype=torch.uint8)
                    wire.receive_into(self._sock, host_bytes(payload))
                    self._held += length
            except Exception as e:
                self._ahead.append(e)
                return False
            self._ahead.append(Frame(kind, header, length, payload))
            return payload is not None
