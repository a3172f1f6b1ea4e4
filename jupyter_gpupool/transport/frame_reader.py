"""Reads a connection's frames through a buffer: a small frame takes one call of the system, not one for each part."""

from __future__ import annotations

from typing import Any

from . import frames, tls
from .polling import Poll

#: The bytes that are asked for at once. A longer payload goes past the buffer, directly to where it belongs.
BUFFER_BYTES = 1 << 16


class FrameReader:
    """The frames that arrive on a connection, in order. One thread at a time may use it.

    A call that an exception leaves, other than by :meth:`has_data`, may have lost bytes: the connection is of no use
    any more.
    """

    def __init__(self, sock: tls.Connection) -> None:
        self.sock = sock
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0
        self._decrypted = sock.pending if isinstance(sock, tls.SecureSocket) else None

    def has_data(self, poll: Poll, timeout_ms: float) -> bool:
        """Wait up to ``timeout_ms`` by ``poll``, and return whether there is something to read."""
        return (
            self._end > self._start
            or (self._decrypted is not None and self._decrypted())
            or bool(poll.poll(timeout_ms))
        )

    def receive(self, max_header: int = frames.MAX_HEADER) -> tuple[frames.Kind, Any, int, int]:
        """Return the next frame's kind, header, payload length and the length of the packed header.

        The payload is next. Raises as :func:`.frames.receive`.
        """
        prefix_size = frames.PREFIX.size
        if self._end - self._start < prefix_size:
            self._fill(prefix_size)
        start = self._start + prefix_size
        kind, header_length, payload_length = frames.PREFIX.unpack_from(self._buffer, self._start)
        if header_length > max_header:
            raise frames.too_long(header_length, max_header)
        if header_length <= BUFFER_BYTES - prefix_size:
            if self._end - start < header_length:
                self._fill(prefix_size + header_length)
                start = self._start + prefix_size
            self._start = start + header_length
            packed = self._buffer[start : self._start]
        else:
            self._start = start
            packed = memoryview(bytearray(header_length))
            self.receive_into(packed)
        return *frames.unpack(kind, packed), payload_length, header_length

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view``, of bytes, from the stream. Raises :class:`~.frames.ConnectionLost`."""
        buffered = min(len(view), self._end - self._start)
        if buffered:
            view[:buffered] = self._buffer[self._start : self._start + buffered]
            self._start += buffered
            view = view[buffered:]
        if len(view):
            frames.receive_into(self.sock, view)

    def discard(self, length: int) -> None:
        """Read ``length`` bytes that nobody wants. Raises :class:`~.frames.ConnectionLost`."""
        buffered = min(length, self._end - self._start)
        self._start += buffered
        length -= buffered
        while length:  # the buffer is empty
            piece = self._buffer[: min(length, BUFFER_BYTES)]
            frames.receive_into(self.sock, piece)
            length -= len(piece)

    def _fill(self, least: int) -> None:
        """Read until the buffer holds ``least`` bytes."""
        if self._start:
            held = self._end - self._start
            if held:
                self._buffer[:held] = self._buffer[self._start : self._end]
            self._start, self._end = 0, held
        while self._end < least:
            self._end += frames.receive_some(self.sock, self._buffer[self._end :])
