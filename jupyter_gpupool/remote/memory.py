"""How much memory a tensor takes on a slice, and what to say when there is not enough."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: The granularity in which device memory is handed out, in bytes; that of CUDA's caching allocator.
GRAIN = 512

_UNITS = ("bytes", "KiB", "MiB", "GiB")


def needed_bytes(size: Sequence[int], stride: Sequence[int], offset: int, itemsize: int) -> int:
    """Bytes from a storage's start to the end of the last element of such a tensor; 0 if it has none."""
    last = offset
    for length, step in zip(size, stride):
        if length == 0:
            return 0
        last += (length - 1) * step
    return (last + 1) * itemsize


def rounded(nbytes: int) -> int:
    """What an allocation of ``nbytes`` takes."""
    return -(-nbytes // GRAIN) * GRAIN


def human(nbytes: float) -> str:
    """``27271364608`` → ``"25.40 GiB"``."""
    for unit in _UNITS[:-1]:
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} {_UNITS[-1]}"


def out_of_memory(index: int, wanted: int, allocated: int, limit: int) -> str:
    """The message of torch.OutOfMemoryError, worded as CUDA's is so that handlers recognise it."""
    return (
        f"CUDA out of memory. Tried to allocate {human(wanted)}. GPU {index} (a gpupool slice) has a total "
        f"capacity of {human(limit)} of which {human(max(0, limit - allocated))} is free. "
        f"Of the allocated memory {human(allocated)} is allocated by PyTorch. "
        "Ask for a larger slice with -p or -m, or free tensors."
    )


def host_bytes(t: torch.Tensor) -> memoryview:
    """The elements of a contiguous CPU tensor as bytes, not copied."""
    n = t.numel() * t.dtype.itemsize
    if n == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * n).from_address(t.data_ptr())).cast("B")
