"""An emulated GPU's memory is this process's heap, which keeps what is freed as CUDA's allocator keeps its blocks."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MOST = 2**31 - 1
_STEP = 64 << 20


def keep_freed_memory() -> bool:
    """From now on freed pages stay in the process; False where the C library knows no such wish.

    By default glibc gives a large tensor's pages back as soon as it is freed, and a training step then
    spends up to a quarter of its time on page faults for the next. Call it before threads are started:
    a thread keeps the arena of its first allocation, and other arenas than the first give back whole heaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wishes = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, _STEP))
    return all(mallopt(what, value) for what, value in wishes)
