"""Which slice a device name means: ``"gpupool:1"``, ``"cuda:1"``, ``1`` and the current device."""

from __future__ import annotations

import threading
from typing import Any

import torch

#: The device's name in PyTorch.
BACKEND = "gpupool"

_current = threading.local()

#: Set by the session: how many slices there are, and whether ``cuda`` means them.
count = 0
cuda_is_ours = False


def current_index() -> int:
    """The calling thread's current device."""
    return getattr(_current, "index", 0)


def set_current_index(index: int) -> None:
    """Raises RuntimeError, worded as CUDA's, for a device that the lease does not have."""
    _current.index = checked(index)


def checked(index: int) -> int:
    if not 0 <= index < count:
        raise RuntimeError(
            f"CUDA error: invalid device ordinal\nThis lease has {count} device{'s' if count != 1 else ''} "
            f"(0 to {count - 1}); device {index} was asked for. Request more with -n."
        )
    return index


def slice_index(device: Any) -> int | None:
    """The slice that ``device`` names, or None where it names something else (the CPU, say)."""
    if isinstance(device, int):
        return checked(device)
    if isinstance(device, str):
        device = torch.device(device)
    if not isinstance(device, torch.device):
        return None
    if device.type == BACKEND or (device.type == "cuda" and cuda_is_ours):
        return current_index() if device.index is None else checked(device.index)
    return None


def says_cuda(device: Any) -> bool:
    """Whether ``device`` names a slice by the word ``cuda``."""
    return cuda_is_ours and isinstance(device, torch.device) and device.type == "cuda"
