"""Read from the first message of a TLS connection which lease's worker the client wants (RFC 8446, 4.1.2), and how.

The sender is not authenticated yet, so every length is checked.
"""

from __future__ import annotations

from .tls import is_former, lease_of

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_ALPN = 16
_HEADER = 5

#: The longest message that is read, in bytes: one record.
MOST = _HEADER + (1 << 14)


class NotTLS(Exception):
    """The bytes are not the beginning of a TLS connection."""


def wanted_lease(data: bytes) -> str | None:
    """Return the lease that the ClientHello at the start of ``data`` names; "" if it names none; None if more bytes
    are needed. Raises :class:`NotTLS`."""
    names = _protocols(data)
    if names is None:
        return None
    return next((lease for lease in map(lease_of, names) if lease is not None), "")


def is_of_earlier_version(data: bytes) -> bool:
    """Return whether ``data`` is the whole ClientHello of a client that trusts the server's certificate only."""
    try:
        names = _protocols(data) or []
    except NotTLS:
        return False
    wanted = [name for name in names if lease_of(name) is not None]
    return bool(wanted) and all(map(is_former, wanted))


def _protocols(data: bytes) -> list[bytes] | None:
    """The application protocols that a ClientHello offers; None if more bytes are needed. Raises NotTLS."""
    if data[:1] not in (b"", bytes([_HANDSHAKE])) or data[1:2] not in (b"", b"\x03"):
        raise NotTLS
    if len(data) < _HEADER:
        return None
    length = int.from_bytes(data[3:5], "big")
    if not 4 <= length <= MOST - _HEADER:
        raise NotTLS
    if len(data) < _HEADER + length:
        return None
    record = _Reader(data[_HEADER : _HEADER + length])
    if record.number(1) != _CLIENT_HELLO:
        raise NotTLS
    hello = _Reader(record.block(3))
    hello.take(2 + 32)  # version, random
    hello.block(1)  # session
    hello.block(2)  # ciphers
    hello.block(1)  # compressions
    extensions = _Reader(hello.block(2)) if hello.left else _Reader(b"")
    found = []
    while extensions.left:
        kind, content = extensions.number(2), extensions.block(2)
        if kind == _ALPN:
            names = _Reader(_Reader(content).block(2))
            while names.left:
                found.append(names.block(1))
    return found


class _Reader:
    """Reads bytes from the front; raises NotTLS if there are too few."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise NotTLS
        part, self._at = self._data[self._at : end], end
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> bytes:
        """Read a block that is preceded by its length in ``size`` bytes."""
        return self.take(self.number(size))
