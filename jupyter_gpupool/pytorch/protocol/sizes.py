"""How many bytes a tensor takes on a slice, and the message when there are not enough."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Device memory is allocated in multiples of so many bytes, as by CUDA's caching allocator.
GRAIN = 512

#: What a CUDA context and loaded kernels take of a GPU, where that is not measured.
CONTEXT_BYTES = 600 << 20

_UNITS = ("bytes", "KiB", "MiB", "GiB")


def needed_bytes(size: Sequence[int], stride: Sequence[int], offset: int, itemsize: int) -> int:
    """Bytes from a storage's start to the end of a tensor's last element, 0 if it has none.

    Size, stride and offset are in elements, ``itemsize`` in bytes.
    """
    last = offset
    for length, step in zip(size, stride):
        if length == 0:
            return 0
        last += (length - 1) * step
    return (last + 1) * itemsize


def rounded(nbytes: int) -> int:
    """The bytes that an allocation of ``nbytes`` takes."""
    return -(-nbytes // GRAIN) * GRAIN


def human(nbytes: float) -> str:
    """``27271364608`` → ``"25.40 GiB"``."""
    for unit in _UNITS[:-1]:
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} {_UNITS[-1]}"


def out_of_memory(
    index: int, wanted: int, allocated: int, limit: int, allowed: int | None = None, overhead: int = 0
) -> str:
    """The message of torch.OutOfMemoryError, in bytes; in CUDA's words, so that handlers recognize it.

    ``allowed``: what the program limits itself to, if that is less than the slice's ``limit``. ``overhead``: what of
    the slice is not for tensors.
    """
    own = f"{human(allowed)} allowed by set_per_process_memory_fraction; " if allowed is not None else ""
    other = f"CUDA itself takes {human(overhead)} of it. " if overhead else ""
    advice = "raise that fraction" if allowed is not None else "request GPUs with more memory (-p or -m)"
    return (
        f"CUDA out of memory. Tried to allocate {human(wanted)}. GPU {index} (a gpupool slice) has a total "
        f"capacity of {human(limit)} of which {human(max(0, limit - overhead - allocated))} is free. {other}"
        f"{own}Of the allocated memory {human(allocated)} is allocated by PyTorch. "
        f"Free tensors, use smaller batches, or {advice}."
    )


def host_bytes(t: torch.Tensor) -> memoryview:
    """The elements of a contiguous CPU tensor as bytes, not copied. They live as long as the view."""
    n = t.numel() * t.dtype.itemsize
    if n == 0:
        return memoryview(b"")
    array: Any = (ctypes.c_char * n).from_address(t.data_ptr())
    array.owner = t
    return memoryview(array).cast("B")
