"""Zeroes what PyTorch's allocator holds of a GPU, so that the next process finds nothing of it.

The driver clears memory between processes, too, but NVIDIA does not promise it. What a process that was killed held,
and what the allocator gives back by itself when it runs out of memory, only the driver clears.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.worker import storage_at

#: The state of a block that no tensor is on, and that no work uses any more.
_FREE = "inactive"


def pieces(
    segments: Iterable[Mapping[str, Any]], ordinal: int | None, only_free: bool
) -> Iterator[tuple[int, int]]:
    """Yield address and size in bytes of what the allocator has of one GPU.

    ``segments``: what the allocator's ``memory_snapshot`` returns. ``only_free``: without the blocks that are in use.
    """
    for segment in segments:
        if segment.get("device") != ordinal:
            continue
        address = segment.get("address", 0)
        for block in segment.get("blocks", ()):
            address = block.get("address", address)
            if block["state"] == _FREE or not only_free:
                yield address, block["size"]
            address += block["size"]


def zero(pieces: Iterable[tuple[int, int]], device: torch.device) -> int:
    """Write zeros there on the current stream, and return how many bytes. Nothing else may use that memory now."""
    total = 0
    for address, nbytes in pieces:
        storage = storage_at(address, device, nbytes)
        torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,)).zero_()
        total += nbytes
    return total
