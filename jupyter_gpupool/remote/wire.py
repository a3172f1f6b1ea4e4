"""Frames on the data plane: how two ends that share one byte stream tell messages apart.

A frame is ``kind: u8, header length: u32, payload length: u64`` (network order), then a msgpack
header and a raw payload. Nothing here decides what a frame means, and nothing is ever unpickled.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from typing import Any

import msgpack

from .tls import Connection

_PREFIX = struct.Struct("!BIQ")

#: The longest header that either end accepts once the other has shown the secret, in bytes.
MAX_HEADER = 64 * 1024 * 1024
#: The longest header (and no payload at all) that a worker accepts before that.
MAX_HELLO = 4096


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1  # client → worker: {protocol, secret, role, torch, threads}
    WELCOME = 2  # worker → client: {protocol, torch, devices}
    REFUSED = 3  # worker → client: {message}; the connection ends
    RECORDS = 4  # client → worker: a flat list of records, see stream.py
    UPLOAD = 5  # client → worker: [storage, geometry], payload: the elements
    VALUE = 6  # worker → client: the answer to a record that asks for one, payload: elements
    ERROR = 7  # worker → client: {operator, type, message}, unasked
    PING = 8  # holder → worker
    BYE = 9  # either: ends on purpose


class WireError(Exception):
    """The other end broke the format; the connection is of no further use."""


class ConnectionLost(ConnectionError):
    """The other end is gone."""


def pack(kind: Kind, header: Any, payload_length: int = 0) -> bytes:
    """The frame's bytes up to its payload."""
    body = msgpack.packb(header)
    return _PREFIX.pack(kind, len(body), payload_length) + body


def send(sock: Connection, kind: Kind, header: Any, payload: memoryview | None = None) -> None:
    """Send one frame; ``payload`` is a memoryview of bytes and is not copied in Python.

    Raises :class:`ConnectionLost`.
    """
    try:
        if payload is None:
            sock.sendall(pack(kind, header))
        else:
            sock.sendall(pack(kind, header, payload.nbytes))
            sock.sendall(payload)
    except OSError as e:
        raise ConnectionLost(f"the connection broke while sending: {e}") from e


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
            raise ConnectionLost("the other end closed the connection")
        view = view[n:]


def receive_exactly(sock: Connection, length: int) -> bytearray:
    """The next ``length`` bytes of the stream."""
    data = bytearray(length)
    receive_into(sock, memoryview(data))
    return data


def receive(sock: Connection, max_header: int = MAX_HEADER) -> tuple[Kind, Any, int]:
    """The next frame's kind, header and payload length; the payload itself is left in the stream.

    Raises :class:`WireError` for anything that is not a frame, :class:`ConnectionLost` at the end.
    """
    kind_value, header_length, payload_length = _PREFIX.unpack(receive_exactly(sock, _PREFIX.size))
    if header_length > max_header:
        raise WireError(f"a header of {header_length} bytes is longer than {max_header} allow")
    try:
        kind = Kind(kind_value)
        header = msgpack.unpackb(receive_exactly(sock, header_length), strict_map_key=True)
    except (ConnectionError, TimeoutError):
        raise
    except Exception as e:
        # msgpack raises several unrelated types; whichever it is, this is not our format.
        raise WireError(f"not a frame: {e}") from None
    return kind, header, payload_length


def tune(sock: Connection, silence_s: float) -> None:
    """Send small frames at once, and notice within ``silence_s`` seconds that a peer is gone."""
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
