"""A few fields of protocol buffers of XLA, whose classes no wheel has."""

from __future__ import annotations

from collections.abc import Iterator


def fields(message: bytes, wanted: int) -> list[bytes]:
    """Return the contents of a field of bytes, each time that it occurs."""
    return [value for value in _values(message, wanted) if isinstance(value, bytes)]


def numbers(message: bytes, wanted: int) -> list[int]:
    """Return the whole numbers of a field, which may be packed."""
    found: list[int] = []
    for value in _values(message, wanted):
        found += _unpacked(value) if isinstance(value, bytes) else [value]
    return found


def _values(message: bytes, wanted: int) -> Iterator[int | bytes]:
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == 0:
            number, at = _read_varint(message, at)
            if tag >> 3 == wanted:
                yield number
        elif kind == 2:
            size, at = _read_varint(message, at)
            if tag >> 3 == wanted:
                yield message[at : at + size]
            at += size
        else:
            at += 8 if kind == 1 else 4


def field(number: int, content: bytes) -> bytes:
    """Return a field of bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """Return a field of a whole number, which is not negative."""
    return _varint(number << 3) + _varint(value)


def device_assignment(devices: list[list[int]]) -> bytes:
    """Return the DeviceAssignmentProto of a program with those devices in each of its replicas."""
    partitions = b"".join(field(3, field(1, b"".join(map(_varint, column)))) for column in zip(*devices))
    return number_field(1, len(devices)) + number_field(2, len(devices[0])) + partitions


def device_numbers(assignment: bytes) -> list[list[int]]:
    """Return the numbers of the devices of each replica in a DeviceAssignmentProto."""
    columns = [numbers(computation, 1) for computation in fields(assignment, 3)]
    return [list(row) for row in zip(*columns)]


def _unpacked(packed: bytes) -> list[int]:
    at, found = 0, []
    while at < len(packed):
        number, at = _read_varint(packed, at)
        found.append(number)
    return found


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
