"""A worker's state as a stream of bytes, which a file, an arena or a connection carries.

The stream is ``gpupool-state``, a version, then records: ``kind: u8, key: u64, offset: u64, length: u64`` (network
order) and ``length`` bytes. Memory may be written again, so that it can be sent while its worker goes on; what the
state at the end names must have arrived whole. Nobody holds a second copy: pieces are bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import msgpack
import torch

from .device import Device
from .lease_state import AwayMemory, BadState, LeaseState, Memory, Unparkable
from .plain_form import plain

_MAGIC = b"gpupool-state\x00\x00\x01"
_RECORD = struct.Struct("!BQQQ")
#: The most bytes of memory in a record.
PIECE_BYTES = 4 << 20
#: The longest description that is accepted, in bytes: definitions and tables, no tensors' elements.
MAX_DESCRIPTION_BYTES = 1 << 30
#: The most pieces of memory.
_MAX_MEMORIES = 10_000_000


class _Kind(IntEnum):
    MEMORY = 1  # key, device's position as offset, bytes as length; no content follows
    BYTES = 2  # key, offset, length
    FREED = 3  # key: it will not be named any more
    STATE = 4  # the description, as msgpack; the stream ends


class StateWriter:
    """Writes one stream. ``write`` takes bytes in order; a buffer may be changed once it has returned."""

    def __init__(self, devices: Sequence[Device], write: Callable[[memoryview], object]) -> None:
        self._devices = devices
        self._write = write
        self._staging = memoryview(bytearray(PIECE_BYTES))
        write(memoryview(_MAGIC))

    def memory(self, key: int, memory: Memory | AwayMemory) -> None:
        """Write a piece of memory, for the first time or again."""
        device, total = self._devices[memory.device], memory.nbytes
        self.begin(key, memory.device, total)
        there = memory.in_place(device)
        for offset in range(0, total, PIECE_BYTES):
            length = min(PIECE_BYTES, total - offset)
            if there is None:
                piece = self._staging[:length]
                memory.read(device, offset, piece)
            else:
                piece = there[offset : offset + length]
            self.part(key, offset, piece)

    def begin(self, key: int, ordinal: int, nbytes: int) -> None:
        """Begin a piece of a device's memory; its parts follow in order."""
        self._record(_Kind.MEMORY, key, ordinal, nbytes)

    def part(self, key: int, offset: int, content: memoryview) -> None:
        """Write the next bytes of a piece of memory, at most :data:`PIECE_BYTES`."""
        self._record(_Kind.BYTES, key, offset, len(content))
        self._write(content)

    def freed(self, key: int) -> None:
        """Note that the memory of that key is not needed any more."""
        self._record(_Kind.FREED, key, 0, 0)

    def state(self, state: LeaseState) -> None:
        """Write the description, which ends the stream. Raises Unparkable where it is too long to be accepted."""
        packed = memoryview(msgpack.packb(plain(state)))
        if len(packed) > MAX_DESCRIPTION_BYTES:
            raise Unparkable(
                f"its programs and tables take {len(packed)} bytes, of which {MAX_DESCRIPTION_BYTES} could move"
            )
        self._record(_Kind.STATE, 0, 0, len(packed))
        for offset in range(0, len(packed), PIECE_BYTES):
            self._write(packed[offset : offset + PIECE_BYTES])

    def _record(self, kind: _Kind, key: int, offset: int, length: int) -> None:
        self._write(memoryview(_RECORD.pack(kind, key, offset, length)))


def write_state(
    devices: Sequence[Device],
    state: LeaseState,
    memories: Mapping[int, Memory | AwayMemory],
    write: Callable[[memoryview], object],
) -> None:
    """Write a state and its memory as one stream."""
    writer = StateWriter(devices, write)
    for key, memory in memories.items():
        writer.memory(key, memory)
    writer.state(state)


@torch.inference_mode()
def read_state(
    devices: Sequence[Device], read_into: Callable[[memoryview], object]
) -> tuple[Any, dict[int, Memory]]:
    """Read a stream to its end: the plain description, and the memory that has arrived, by key.

    ``read_into`` fills a buffer with the next bytes, or raises. Memory beyond the devices' limits is refused before it
    is allocated. Raises :class:`BadState`.
    """
    return _Reading(devices, read_into).run()


class _Reading:
    def __init__(self, devices: Sequence[Device], read_into: Callable[[memoryview], object]) -> None:
        self._devices = devices
        self._read_into = read_into
        self._left = [d.limit - d.allocated for d in devices]
        self._memories: dict[int, Memory] = {}
        self._filled: dict[int, int] = {}
        self._staging = memoryview(bytearray(PIECE_BYTES))

    def run(self) -> tuple[Any, dict[int, Memory]]:
        if self._bytes(len(_MAGIC)) != _MAGIC:
            raise BadState("this is no state of a worker, or one of another version")
        while True:
            kind, key, offset, length = _RECORD.unpack(self._bytes(_RECORD.size))
            if kind == _Kind.MEMORY:
                self._memory(key, offset, length)
            elif kind == _Kind.BYTES:
                self._fill(key, offset, length)
            elif kind == _Kind.FREED:
                self._free(key)
            elif kind == _Kind.STATE:
                return self._state(length), self._whole()
            else:
                raise BadState(f"a record of kind {kind}")

    def _bytes(self, length: int) -> bytes:
        buffer = bytearray(length)
        self._read_into(memoryview(buffer))
        return bytes(buffer)

    def _memory(self, key: int, ordinal: int, nbytes: int) -> None:
        known = self._memories.get(key)
        if known is not None and (known.device, known.bytes.numel()) == (ordinal, nbytes):
            self._filled[key] = 0
            return
        self._free(key)
        if ordinal >= len(self._devices) or len(self._memories) >= _MAX_MEMORIES:
            raise BadState(f"memory of device {ordinal} of {len(self._devices)}")
        if nbytes > self._left[ordinal]:
            raise BadState(
                f"{nbytes} bytes more than device {ordinal} has, which has {self._left[ordinal]} left"
            )
        self._left[ordinal] -= nbytes
        device = self._devices[ordinal]
        self._memories[key] = Memory(
            ordinal, torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
        )
        self._filled[key] = 0

    def _fill(self, key: int, offset: int, length: int) -> None:
        memory = self._memories.get(key)
        if memory is None or length > PIECE_BYTES or offset != self._filled[key]:
            raise BadState(f"{length} bytes at {offset} of memory {key}, which are not the next ones")
        if offset + length > memory.bytes.numel():
            raise BadState(f"memory {key} has only {memory.bytes.numel()} bytes")
        device = self._devices[memory.device]
        there = device.in_place(memory.bytes)
        if there is None:
            piece = self._staging[:length]
            self._read_into(piece)
            device.copy_from_host(memory.bytes[offset : offset + length], piece)
        else:
            self._read_into(there[offset : offset + length])
        self._filled[key] += length

    def _free(self, key: int) -> None:
        memory = self._memories.pop(key, None)
        if memory is not None:
            self._left[memory.device] += memory.bytes.numel()
            del self._filled[key]

    def _state(self, length: int) -> Any:
        if length > MAX_DESCRIPTION_BYTES:
            raise BadState(f"a description of {length} bytes")
        try:
            return msgpack.unpackb(self._bytes(length), strict_map_key=True)
        except Exception as e:  # msgpack raises several unrelated types; all mean that this is not our form
            raise BadState(f"a description that cannot be read: {e}") from None

    def _whole(self) -> dict[int, Memory]:
        for key, memory in self._memories.items():
            if self._filled[key] != memory.bytes.numel():
                raise BadState(f"memory {key} arrived only in part")
        return self._memories
