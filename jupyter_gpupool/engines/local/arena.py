"""Host memory for parked leases: reserved when the server starts, anonymous, and never seen by two leases.

A chunk is a file in memory without a name. A worker gets the descriptors of its own chunks and of no others. Who has
once mapped a chunk might still see what is in it, be it a worker that goes on or a process that one has started: a
chunk that comes back is replaced by a new one.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from logging import LoggerAdapter
from typing import Any

from .arena_account import ArenaAccount, ArenaFull

_MIB = 1 << 20
#: The most chunks, since each is an open file; and the smallest size of one, in MiB.
_MAX_CHUNKS = 256
_MIN_CHUNK_MIB = 4


class Arena:
    """So many MiB of memory, in chunks."""

    def __init__(self, memory_mib: int, log: Any) -> None:
        self._log: LoggerAdapter[Any] = log
        self.chunk_mib = max(_MIN_CHUNK_MIB, -(-memory_mib // _MAX_CHUNKS))
        self._count = memory_mib // self.chunk_mib
        self._account = ArenaAccount()
        self._chunks: dict[int, tuple[int, mmap.mmap]] = {}
        self._next = 0
        self._work: set[asyncio.Task[None]] = set()
        self._warned = False
        self._closed = False

    @property
    def memory_mib(self) -> int:
        """What can be lent in all."""
        return self._count * self.chunk_mib

    @property
    def free_mib(self) -> int:
        """What can be lent now."""
        return self._account.free * self.chunk_mib

    async def reserve(self) -> None:
        """Reserve the memory. Raises OSError if there is not enough; then none is kept."""
        try:
            for _ in range(self._count):
                await self._add()
        except OSError:
            await self.close()
            raise

    async def close(self) -> None:
        """Give the memory back; what workers have of it stays theirs."""
        self._closed = True
        await asyncio.gather(*self._work)
        for descriptor, mapped in self._chunks.values():
            mapped.close()
            os.close(descriptor)
        self._chunks.clear()

    def lend(self, lease_id: str, memory_mib: int) -> list[int]:
        """Lend a lease what it lacks of so many MiB: the descriptors to send it. Raises :class:`ArenaFull`."""
        wanted = -(-memory_mib // self.chunk_mib) - len(self._account.lent(lease_id))
        return [self._chunks[chunk][0] for chunk in self._account.lend(lease_id, max(0, wanted))]

    def lent_mib(self, lease_id: str) -> int:
        """What a lease has of it."""
        return len(self._account.lent(lease_id)) * self.chunk_mib

    def lenders(self, *besides: str) -> list[str]:
        """The leases that have some of it, the one with the most first."""
        return self._account.lenders(besides)

    def release(self, lease_id: str) -> asyncio.Task[None]:
        """Take back what a lease has."""
        task = asyncio.get_running_loop().create_task(self._renew(self._account.release(lease_id)))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _renew(self, chunks: list[int]) -> None:
        for chunk in chunks:
            if self._closed:
                return
            descriptor, mapped = self._chunks.pop(chunk)
            mapped.close()
            os.close(descriptor)
            try:
                await self._reserve(chunk)
            except OSError as e:
                self._log.error("The memory for parked leases shrinks: %s", e.strerror)

    async def _add(self) -> None:
        await self._reserve(self._next)
        self._next += 1

    async def _reserve(self, chunk: int) -> None:
        self._chunks[chunk] = await asyncio.to_thread(_chunk, self.chunk_mib * _MIB)
        is_locked = await asyncio.to_thread(_lock, self._chunks[chunk][1])
        if not is_locked and not self._warned:
            self._warned = True
            self._log.warning(
                "The memory for parked leases cannot be locked, so it may be swapped out; "
                "raise the limit of locked memory (LimitMEMLOCK= of systemd, ulimit -l)"
            )
        if not self._closed:
            self._account.add(chunk)


def _chunk(nbytes: int) -> tuple[int, mmap.mmap]:
    """New memory, all of it allocated: the first touch takes far longer than any other."""
    descriptor = os.memfd_create("gpupool-arena", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        return descriptor, mmap.mmap(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise


def _address(mapped: mmap.mmap) -> Any:
    return (ctypes.c_char * len(mapped)).from_buffer(mapped)


def _lock(mapped: mmap.mmap) -> bool:
    return bool(ctypes.CDLL(None).mlock(ctypes.byref(_address(mapped)), ctypes.c_size_t(len(mapped))) == 0)


__all__ = ["Arena", "ArenaFull"]
