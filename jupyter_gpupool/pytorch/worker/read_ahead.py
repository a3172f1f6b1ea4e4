"""Reads a session's frames, also ahead while one is executed, so that copies travel while operators run.

One thread executes operators. A second one only reads, and only if a frame takes a while. Both go on with the session's
next connection when one is lost.
"""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from jupyter_gpupool.pytorch.protocol.sizes import host_bytes
from jupyter_gpupool.transport import frames
from jupyter_gpupool.transport.frame_reader import FrameReader
from jupyter_gpupool.transport.resumption import ACKNOWLEDGE_AFTER_S, MAX_KEPT_FRAMES
from jupyter_gpupool.transport.tls import Connection

from .templates import BadRecord

#: Seconds that a frame is executed before others are read ahead.
_READ_AHEAD_AFTER_S = 0.001
#: The most frames that are read ahead, and the most bytes of their payloads: all that a client sends before it waits
#: for acknowledgements, so that it can always send them.
_MAX_FRAMES_AHEAD = MAX_KEPT_FRAMES
_MAX_BYTES_AHEAD = 256 << 20


class SessionOver(Exception):
    """The session ends: nobody has come back to it."""


class Frame(NamedTuple):
    """A frame. ``payload`` is None if it is still to be read from ``reader``; ``length`` is in bytes.

    ``nbytes``: the bytes of header and payload.
    """

    kind: frames.Kind
    header: Any
    length: int
    payload: torch.Tensor | None
    reader: FrameReader | None = None
    nbytes: int = 0


class _Executing:
    """Whether a frame is being executed. One thread says so, another one may wait for it.

    A frame costs the first one next to nothing while the other does not wait: most take far less time than waking it.
    """

    __slots__ = ("now", "count", "_waiting", "_begun")

    def __init__(self) -> None:
        self.now = False
        #: how many frames have begun
        self.count = 0
        self._waiting = False
        self._begun = threading.Event()

    def __enter__(self) -> None:
        self.count += 1
        self.now = True
        if self._waiting:  # looked at last, as wait() looks at `now` last: one of them sees the other
            self._begun.set()

    def __exit__(self, *error: object) -> None:
        self.now = False

    def is_still(self, count: int) -> bool:
        """Whether the frame of that count is being executed."""
        return self.now and self.count == count

    def wait(self) -> None:
        """Return when a frame is being executed, or after :meth:`wake`."""
        self._waiting = True
        if not self.now:
            self._begun.wait()
        self._waiting = False
        self._begun.clear()

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self._begun.set()


class Incoming:
    """The frames of one session, through all its connections. ``limit`` is the longest payload accepted, in bytes.

    ``on_frame`` is called with each frame that does not count, PING and ACK; ``on_idle`` if nothing has arrived for a
    moment; ``on_lost`` with a connection that broke, and why.
    """

    def __init__(
        self,
        sock: Connection | None,
        limit: int,
        on_frame: Callable[[frames.Kind, Any], None] = lambda kind, header: None,
        on_idle: Callable[[], None] = lambda: None,
        on_lost: Callable[[Connection, OSError], None] = lambda sock, why: None,
    ) -> None:
        self._limit = limit
        self._on_frame = on_frame
        self._on_idle = on_idle
        self._on_lost = on_lost
        #: how many frames of the session are here, whole
        self.received = 0
        self._reader: FrameReader | None = None
        # A poll object serves one thread at a time.
        self._poll, self._poll_ahead = select.poll(), select.poll()
        self._reading = threading.Lock()  # a condition's own methods would take several times as long
        self._attached = threading.Condition(self._reading)
        self._ahead: collections.deque[Frame | Exception] = collections.deque()
        self._held = 0
        self._executing = _Executing()
        self._over = False
        if sock is not None:
            self.attach(sock)
        self._thread = threading.Thread(target=self._read_ahead, name="ahead", daemon=True)
        self._thread.start()

    # -- connections

    def attach(self, sock: Connection) -> None:
        """Go on with this connection."""
        with self._reading:
            self._reader = FrameReader(sock)
            self._poll, self._poll_ahead = select.poll(), select.poll()
            for poll in (self._poll, self._poll_ahead):
                poll.register(sock, select.POLLIN)
            self._attached.notify_all()

    def detach(self) -> None:
        """Read no more from the connection, if there is one. It is shut down, so that a thread that reads wakes."""
        reader = self._reader
        if reader is not None:
            with contextlib.suppress(OSError):
                reader.sock.shutdown(socket.SHUT_RDWR)
        with self._reading:
            self._reader = None

    def close(self) -> None:
        """End: :meth:`next` raises SessionOver from now on."""
        self._over = True
        self._executing.wake()
        self.detach()
        with self._reading:
            self._attached.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _lose(self, reader: FrameReader, why: OSError) -> None:
        """Called with the lock."""
        if self._reader is reader:
            self._reader = None
            self._on_lost(reader.sock, why)

    # -- frames

    def next(self) -> Frame:
        """The next frame, from whatever connection.

        Raises SessionOver, WireError, and BadRecord for a payload that is too long.
        """
        while True:
            with self._reading:
                if self._over:
                    raise SessionOver
                if self._ahead:
                    frame = self._ahead.popleft()
                    break
                reader = self._reader
                if reader is None:
                    self._attached.wait()
                    continue
                try:
                    if not reader.has_data(self._poll, ACKNOWLEDGE_AFTER_S * 1000):
                        self._on_idle()
                    found = self._receive(reader)
                except OSError as e:
                    self._lose(reader, e)
                    continue
                if found is not None:
                    kind, header, length, nbytes = found
                    if not length:
                        self._count(kind)
                    return Frame(kind, header, length, None, reader, nbytes)
        if isinstance(frame, Exception):
            raise frame
        if frame.payload is not None:
            self._held -= frame.length
        return frame

    def read_payload(self, frame: Frame, view: memoryview, is_last: bool = True) -> None:
        """Fill ``view`` with the next, or last, piece of the payload of a frame that was not read ahead.

        Raises ConnectionLost; then all of the frame is to come once more.
        """
        reader = frame.reader
        with self._reading:
            if reader is None or self._reader is not reader:
                raise frames.ConnectionLost("the connection is gone, and the frame will be sent again")
            try:
                reader.receive_into(view)
            except OSError as e:
                self._lose(reader, e)
                raise
            if is_last:
                self._count(frame.kind)

    def meanwhile(self) -> _Executing:
        """Within, frames are read ahead. Not for a frame whose payload is still in the connection."""
        return self._executing

    def _receive(self, reader: FrameReader) -> tuple[frames.Kind, Any, int, int] | None:
        """Read a frame up to its payload: kind, header, bytes of the payload and of both. None for PING and ACK."""
        kind, header, length, header_length = reader.receive()
        if kind in (frames.Kind.PING, frames.Kind.ACK):
            if length:
                raise frames.WireError(f"{kind.name} with a payload")
            self._on_frame(kind, header)
            return None
        if length > self._limit:
            raise BadRecord(f"an upload of {length} bytes to a slice of {self._limit}")
        return kind, header, length, header_length + length

    def _count(self, kind: frames.Kind) -> None:
        if kind in frames.COUNTED:
            self.received += 1

    def _read_ahead(self) -> None:
        pause = threading.Event()
        executing = self._executing
        while not self._over:
            executing.wait()
            count = executing.count
            pause.wait(_READ_AHEAD_AFTER_S)
            while executing.is_still(count) and not self._over and len(self._ahead) < _MAX_FRAMES_AHEAD:
                reader = self._reader
                if reader is None:
                    pause.wait(0.005)
                elif self._has_data(reader) and not self._read_one():
                    break

    def _has_data(self, reader: FrameReader) -> bool:
        try:
            return reader.has_data(self._poll_ahead, 5)
        except (OSError, ValueError):
            return False  # closed in this moment

    def _read_one(self) -> bool:
        """Read a frame. False if nothing can be read ahead now."""
        with self._reading:
            reader = self._reader
            if reader is None or not self._executing.now or not reader.has_data(self._poll_ahead, 0):
                return False
            last = self._ahead[-1] if self._ahead else None
            if isinstance(last, Exception) or (last is not None and last.length and last.payload is None):
                return False  # nothing, or that frame's payload, is next in the connection
            payload = None
            try:
                found = self._receive(reader)
                if found is None:
                    return True
                kind, header, length, nbytes = found
                if self._held + length <= _MAX_BYTES_AHEAD:
                    payload = torch.empty(length, dtype=torch.uint8)
                    reader.receive_into(host_bytes(payload))
                    self._held += length
                    self._count(kind)
            except OSError as e:
                self._lose(reader, e)
                return False
            except Exception as e:
                self._ahead.append(e)
                return False
            self._ahead.append(Frame(kind, header, length, payload, reader, nbytes))
            return payload is not None
