"""Frames: messages on the byte stream between a client and a worker.

A frame is ``kind: u8, header length: u32, payload length: u64`` (network order), then a msgpack
header and a raw payload. This module does not interpret the content, and nothing is ever unpickled.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from typing import Any

import msgpack

from .tls import Connection

#: What each frame begins with: kind, length of the header, length of the payload.
PREFIX = struct.Struct("!BIQ")

#: The longest header that either end accepts after authentication, in bytes.
MAX_HEADER = 64 * 1024 * 1024
#: The longest header that a worker accepts before authentication, in bytes; no payload is accepted then.
MAX_HELLO = 4096


class Kind(IntEnum):
    """The type of a frame."""

    # client → worker: {protocol, secret, role, torch, threads, session, generation, received, new}; of another
    # framework than PyTorch, {framework} and its release in place of torch and threads; over TLS {sealed} in place of
    # the secret, see proofs.py
    HELLO = 1
    # worker → client: {protocol, torch, devices, software, received, done, resume_s, window_mib}, over TLS {proof}
    WELCOME = 2
    REFUSED = 3  # worker → client: {message, moved: [host, port] of a lease that goes on there}; the connection ends
    RECORDS = 4  # client → worker: a flat list of records, see pytorch/protocol/commands.py; counts
    UPLOAD = 5  # client → worker: [storage, geometry], payload: the elements; counts
    VALUE = 6  # worker → client: [number of the frame that asked, the answer], payload: elements; counts
    ERROR = 7  # worker → client: {operator, type, message}, unsolicited; counts
    PING = 8  # holder → worker, and back; of a session: acknowledge at once
    BYE = 9  # either: intentional end of the session, or of the holder's part; of a worker: {message, moved}
    ACK = 10  # either: the number of the last frame that this end has acted on
    PROBE = 11  # worker → holder: {machine, pid, born}, and back: {process, lives}
    PEER = (
        13  # worker → worker: [what, group, …], see pytorch/worker/spread_collectives.py; payload: elements
    )
    STATE = 12  # worker → worker, after the lease's state: what else belongs to it; and back: {failed}


#: The kinds that count as a session's frames: they are acknowledged, and sent again after a lost connection.
COUNTED = frozenset((Kind.RECORDS, Kind.UPLOAD, Kind.VALUE, Kind.ERROR))


_KINDS = {int(kind): kind for kind in Kind}


class WireError(Exception):
    """The other end violated the format; the connection cannot be used any more."""


class ConnectionLost(ConnectionError):
    """The other end has closed the connection, or is unreachable."""


class ConnectionClosed(ConnectionLost):
    """The other end's system has closed the connection in order: its process has ended, or something between did it."""


class Unreachable(ConnectionLost):
    """No connection to the GPU server can be made."""


class NoWorker(ConnectionLost):
    """The GPU server answers, and has no worker for the lease."""


def pack(kind: Kind, header: Any, payload_length: int = 0) -> bytes:
    """Return the frame's bytes up to its payload."""
    body: bytes = msgpack.packb(header)
    return PREFIX.pack(kind, len(body), payload_length) + body


def header_of(packed: bytes) -> tuple[Kind, Any]:
    """Return the kind and the header of what :func:`pack` returned."""
    kind, length, _ = PREFIX.unpack_from(packed)
    return unpack(kind, memoryview(packed)[PREFIX.size : PREFIX.size + length])


def send(sock: Connection, kind: Kind, header: Any, payload: memoryview | None = None) -> None:
    """Send one frame; ``payload`` is a memoryview of bytes and is not copied in Python.

    Raises :class:`ConnectionLost`.
    """
    try:
        if payload is None:
            send_all(sock, pack(kind, header))
        else:
            send_all(sock, pack(kind, header, payload.nbytes))
            send_all(sock, payload)
    except OSError as e:
        raise ConnectionLost(f"the connection broke while sending: {e}") from e


def send_all(sock: Connection, data: Any) -> None:
    """Send bytes. A timeout of ``sock`` is for making any progress, not for all of it. Raises OSError."""
    sent = sock.send(data)
    if sent < len(data):
        rest = memoryview(data)[sent:]
        while len(rest):
            rest = rest[sock.send(rest) :]


def receive_some(sock: Connection, view: memoryview) -> int:
    """Read what has arrived into ``view``, waiting for the first byte; return how many bytes.

    Raises :class:`ConnectionLost`, and TimeoutError by a timeout of ``sock``.
    """
    try:
        n = sock.recv_into(view)
    except TimeoutError:
        raise
    except OSError as e:
        raise ConnectionLost(f"the connection broke while receiving: {e}") from e
    if n == 0:
        raise ConnectionClosed("the other end closed the connection")
    return n


def receive_into(sock: Connection, view: memoryview) -> None:
    """Fill ``view`` from the stream. Raises as :func:`receive_some`."""
    while len(view):
        view = view[receive_some(sock, view) :]


def receive(sock: Connection, max_header: int = MAX_HEADER) -> tuple[Kind, Any, int]:
    """Return the next frame's kind, header and payload length, and read no byte more of the stream.

    Raises :class:`WireError` for anything that is not a frame, :class:`ConnectionLost` at the end.
    """
    kind, header_length, payload_length = PREFIX.unpack(_receive_exactly(sock, PREFIX.size))
    if header_length > max_header:
        raise too_long(header_length, max_header)
    return *unpack(kind, _receive_exactly(sock, header_length)), payload_length


def too_long(length: int, most: int) -> WireError:
    """The error for a header of ``length`` bytes where ``most`` are allowed."""
    return WireError(f"a header of {length} bytes is longer than {most} allow")


def unpack(kind: int, header: bytearray | memoryview) -> tuple[Kind, Any]:
    """Return a frame's kind and header from its bytes. Raises :class:`WireError`."""
    try:
        return _KINDS[kind], msgpack.unpackb(header, strict_map_key=True)
    except Exception as e:
        # msgpack raises several unrelated types; all mean that this is not our format.
        raise WireError(f"not a frame: {e}") from None


def _receive_exactly(sock: Connection, length: int) -> bytearray:
    data = bytearray(length)
    receive_into(sock, memoryview(data))
    return data


def tune(sock: Connection, silence_s: float) -> None:
    """Send small frames without delay, and detect within ``silence_s`` seconds that the peer is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = max(1, int(silence_s / 3))
    for name, value in (
        ("TCP_KEEPIDLE", third),
        ("TCP_KEEPINTVL", third),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(silence_s * 1000)),
    ):
        option = getattr(socket, name, None)  # not every platform has all of them
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
