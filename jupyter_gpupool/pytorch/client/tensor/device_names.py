"""Resolves the names of devices: ``"gpupool:1"``, ``"cuda:1"``, ``1`` and the current device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: The device's name in PyTorch.
BACKEND = "gpupool"


class _Thread(threading.local):
    index = 0
    hidden = 0


_current = _Thread()

#: Set when a lease is attached: the number of its slices, and whether ``cuda`` means them.
count = 0
cuda_is_ours = False
#: the value of CUDA_VISIBLE_DEVICES that holds, and the number of slices that it leaves out
choice: str | None = None
left_out = 0
#: whether the program has chosen a current device
chosen = False


def _nothing() -> None:
    pass


#: Reads CUDA_VISIBLE_DEVICES anew, as CUDA does until a program uses a GPU; set when a lease is attached.
refresh: Callable[[], None] = _nothing


def current_index() -> int:
    """The calling thread's current device."""
    return _current.index


def set_current_index(index: int) -> None:
    """Make ``index`` the calling thread's current device. Raises RuntimeError if the lease does not have it."""
    global chosen
    _current.index = checked(index)
    chosen = True


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Within, ``torch.cuda`` reports no devices to this thread: what it does is for the CPU alone."""
    _current.hidden += 1
    try:
        yield
    finally:
        _current.hidden -= 1


def visible_count() -> int:
    """The number of slices, or 0 within :func:`hidden`."""
    return 0 if _current.hidden else count


def reset_current_index() -> None:
    """Make the first device the calling thread's current one, also where there is none, as if none were chosen."""
    global chosen
    _current.index = 0
    chosen = False


def checked(index: int) -> int:
    """``index``. Raises RuntimeError, worded as CUDA's, if the lease has no such device."""
    if not 0 <= index < count:
        refresh()
        if not 0 <= index < count:
            raise _no_device(index)
    return index


def _no_device(index: int) -> RuntimeError:
    if not count:
        return RuntimeError(
            f"No CUDA GPUs are available, because CUDA_VISIBLE_DEVICES={choice!r} hides all {left_out} of this lease; "
            "unset it before the program uses a GPU"
            if left_out
            else "No CUDA GPUs are available"
        )
    advice = (
        f"CUDA_VISIBLE_DEVICES={choice!r} hides {left_out} more; change it before the program uses a GPU."
        if left_out
        else "Request more GPUs (num_gpus, or -n)."
    )
    return RuntimeError(
        f"CUDA error: invalid device ordinal\nThis lease has {count} device{'s' if count != 1 else ''} "
        f"(0 to {count - 1}); device {index} was asked for. {advice}"
    )


def slice_index(device: Any) -> int | None:
    """The number of the slice that ``device`` names, or None if it names something else, such as the CPU."""
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
    """Whether ``device`` names a slice as ``cuda``."""
    return cuda_is_ours and isinstance(device, torch.device) and device.type == "cuda"
