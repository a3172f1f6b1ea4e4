"""Keeps freed memory in the process, as CUDA's allocator does: the heap is an emulated GPU's memory."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MAX_INT = 2**31 - 1
_GROWTH_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Keep freed pages in the process from now on. Returns False if the C library cannot.

    By default glibc returns a large tensor's pages to the system as soon as it is freed, and a training step
    then spends up to a quarter of its time on page faults. Call this before threads are started: a thread
    keeps the arena of its first allocation, and arenas other than the first return whole heaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, _MAX_INT),
        (_M_TOP_PAD, _GROWTH_BYTES),
    )
    return all(mallopt(what, value) for what, value in settings)
