"""Host memory that the engine lends this worker, in chunks, for copies of its devices' memory."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable

import torch

from .device import Device

#: Where a piece of memory is: chunk, offset in it, length, all in bytes.
Extent = tuple[int, int, int]

#: Copies start at multiples of so many bytes.
_GRAIN = 512


class ArenaFull(Exception):
    """The chunks that are lent do not suffice."""


class Extents:
    """Which bytes of some chunks are in use. A piece may be in several places, so nothing is lost between pieces."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._free: list[Extent] = []

    @property
    def total(self) -> int:
        """The bytes of all chunks."""
        return sum(self._sizes)

    @property
    def free(self) -> int:
        """The bytes that are not in use."""
        return sum(length for _, _, length in self._free)

    def add_chunk(self, nbytes: int) -> None:
        """Use one more chunk. Its size is a multiple of the page size."""
        self._free.append((len(self._sizes), 0, nbytes))
        self._sizes.append(nbytes)

    def take(self, nbytes: int) -> tuple[Extent, ...]:
        """Places for so many bytes. Raises :class:`ArenaFull`, and takes nothing then."""
        wanted = -(-nbytes // _GRAIN) * _GRAIN
        if wanted > self.free:
            raise ArenaFull(f"{nbytes} bytes, where {self.free} of {self.total} are free")
        taken: list[Extent] = []
        while wanted:
            chunk, offset, length = self._free.pop()
            part = min(length, wanted)
            taken.append((chunk, offset, part))
            if part < length:
                self._free.append((chunk, offset + part, length - part))
            wanted -= part
        return tuple(taken)

    def give(self, extents: Iterable[Extent]) -> None:
        """Take places back."""
        self._free.extend(extents)
        self._free.sort(reverse=True)
        merged: list[Extent] = []
        for chunk, offset, length in self._free:
            if merged and merged[-1][0] == chunk and merged[-1][1] == offset + length:
                length += merged.pop()[2]
            merged.append((chunk, offset, length))
        self._free = merged


class ArenaMemory:
    """The chunks, mapped into this process. Not safe for use by several threads at once, except for reading."""

    def __init__(self) -> None:
        self._extents = Extents()
        self._mapped: list[mmap.mmap] = []

    @property
    def total(self) -> int:
        """The bytes that are lent."""
        return self._extents.total

    @property
    def free(self) -> int:
        """The bytes that no copy uses."""
        return self._extents.free

    def add_chunk(self, descriptor: int) -> None:
        """Map a chunk, and close its descriptor. Raises OSError for what cannot be one."""
        try:
            nbytes = os.fstat(descriptor).st_size
            if nbytes <= 0 or nbytes % mmap.PAGESIZE:
                raise OSError(f"a chunk of {nbytes} bytes")
            self._mapped.append(mmap.mmap(descriptor, nbytes))
        finally:
            os.close(descriptor)
        self._extents.add_chunk(nbytes)

    def give_back(self) -> None:
        """Unmap every chunk. Nothing may be in use."""
        for chunk in self._mapped:
            with contextlib.suppress(
                BufferError
            ):  # a view of it is about to go; then the mapping goes with it
                chunk.close()
        self._mapped, self._extents = [], Extents()

    def take(self, nbytes: int) -> tuple[Extent, ...]:
        """Places for so many bytes. Raises :class:`ArenaFull`."""
        return self._extents.take(nbytes)

    def give(self, extents: Iterable[Extent]) -> None:
        """Free places that a copy used."""
        self._extents.give(extents)

    def store(
        self, device: Device, memory: torch.Tensor, extents: tuple[Extent, ...], at: int, most: int
    ) -> int:
        """Copy at most so many bytes of a device's memory from ``at`` on; return how many."""
        view = self._view(extents, at, min(most, memory.numel() - at))
        device.copy_to_host(memory[at : at + len(view)], view)
        return len(view)

    def load(self, device: Device, memory: torch.Tensor, extents: tuple[Extent, ...]) -> None:
        """Fill a device's memory from its copy."""
        at = 0
        while at < memory.numel():
            view = self._view(extents, at, memory.numel() - at)
            device.copy_from_host(memory[at : at + len(view)], view)
            at += len(view)

    def read(self, extents: tuple[Extent, ...], at: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a copy from ``at`` on."""
        while len(into):
            view = self._view(extents, at, len(into))
            into[: len(view)] = view
            at, into = at + len(view), into[len(view) :]

    def _view(self, extents: tuple[Extent, ...], at: int, most: int) -> memoryview:
        """The bytes from ``at`` on that are in one place."""
        for chunk, offset, length in extents:
            if at < length:
                return memoryview(self._mapped[chunk])[offset + at : offset + at + min(length - at, most)]
            at -= length
        raise ValueError("a copy that is too short")
