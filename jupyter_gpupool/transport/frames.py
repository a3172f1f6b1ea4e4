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

_PREFIX = struct.Struct("!BIQ")

#: The longest header that either end accepts after authentication, in bytes.
MAX_HEADER = 64 * 1024 * 1024
#: The longest header that a worker accepts before authentication, in bytes; no payload is accepted then.
MAX_HELLO = 4096


class Kind(IntEnum):
    """The type of a frame."""

    HELLO = 1  # client → worker: {protocol, secret, role, torch, threads, session, generation, received, new}
    WELCOME = 2  # worker → client: {protocol, torch, devices, software, received, done, resume_s, window_mib}
    REFUSED = 3  # worker → client: {message}; the connection ends
    RECORDS = 4  # client → worker: a flat list of records, see pytorch/protocol/commands.py; counts
    UPLOAD = 5  # client → worker: [storage, geometry], payload: the elements; counts
    VALUE = 6  # worker → client: [number of the frame that asked, the answer], payload: elements; counts
    ERROR = 7  # worker → client: {operator, type, message}, unsolicited; counts
    PING = 8  # holder → worker, and back; of a session: acknowledge at once
    BYE = 9  # either: intentional end of the session, or of the holder's part
    ACK = 10  # either: the number of the last frame that this end has acted on
    PROBE = 11  # worker → holder: {machine, pid, born}, and back: {process, lives}


#: The kinds that count as a session's frames: they are acknowledged, and sent again after a lost connection.
COUNTED = frozenset((Kind.RECORDS, Kind.UPLOAD, Kind.VALUE, Kind.ERROR))


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
    return _PREFIX.pack(kind, len(body), payload_length) + body


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


def receive_into(sock: Connection, view: memoryview) -> None:
    """Fill ``view`` from the stream. Raises :class:`ConnectionLost`."""
    while len(view):
        try:
            n = sock.recv_into(view)
        except TimeoutError:
            raise
        except OSError as e:
            raise ConnectionLost(f"the connection broke while receiving: {e}") from e
        if n == 0:
            raise ConnectionClosed("the other end closed the connection")
        view = view[n:]


def receive_exactly(sock: Connection, length: int) -> bytearray:
    """Return the next ``length`` bytes of the stream. Raises :class:`ConnectionLost`."""
    data = bytearray(length)
    receive_into(sock, memoryview(data))
    return data


def receive(sock: Connection, max_header: int = MAX_HEADER) -> tuple[Kind, Any, int]:
    """Return the next frame's kind, header and payload length; the payload stays in the stream.

    Raises :class:`WireError` for anything that is not a frame, :class:`ConnectionLost` at the end.
    """
    return receive_sized(sock, max_header)[:3]


def receive_sized(sock: Connection, max_header: int = MAX_HEADER) -> tuple[Kind, Any, int, int]:
    """As :func:`receive`, and the length of the packed header."""
    kind_value, header_length, payload_length = _PREFIX.unpack(receive_exactly(sock, _PREFIX.size))
    if header_length > max_header:
        raise WireError(f"a header of {header_length} bytes is longer than {max_header} allow")
    try:
        kind = Kind(kind_value)
        header = msgpack.unpackb(receive_exactly(sock, header_length), strict_map_key=True)
    except (ConnectionError, TimeoutError):
        raise
    except Exception as e:
        # msgpack raises several unrelated types; all mean that this is not our format.
        raise WireError(f"not a frame: {e}") from None
    return kind, header, payload_length, header_length


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
