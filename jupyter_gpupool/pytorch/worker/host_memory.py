"""Tells an operator that found no host memory from other errors: the worker may have only so much of it."""

from __future__ import annotations

import resource

#: How the allocators of PyTorch and of the C++ library say it.
_WORDS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "bad_alloc")


def no_host_memory(error: BaseException) -> str | None:
    """Return a message for an operator that found no host memory; None for any other error."""
    is_it = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    )
    if not is_it:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    bound = (
        f"a process of the worker may allocate {limit >> 20} MiB"
        if limit != resource.RLIM_INFINITY
        else "the GPU server has no more"
    )
    return f"out of host memory on the GPU server: {bound}. Delete tensors, or use smaller ones"
