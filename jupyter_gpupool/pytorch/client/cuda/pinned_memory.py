"""Pinned host memory, as far as programs can see it.

``pin_memory()`` returns a copy that reports to be pinned. Its memory is not locked: copies to a slice go
through a connection, which would not become faster.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from jupyter_gpupool.pytorch.client.tensor.patches import Patches

#: Pinned storages by their address in PyTorch. A weak reference keeps the address from being reused.
_pinned: dict[int, StorageWeakRef] = {}
_limit = 1024


def pin(t: torch.Tensor) -> torch.Tensor:
    """Declare the memory of ``t`` pinned, and return ``t``."""
    global _limit
    if len(_pinned) >= _limit:
        for address in [a for a, ref in _pinned.items() if ref.expired()]:
            del _pinned[address]
        _limit = max(1024, 2 * len(_pinned))
    storage = t.untyped_storage()
    _pinned[storage._cdata] = StorageWeakRef(storage)
    return t


def is_pinned(t: torch.Tensor) -> bool:
    """Whether the memory of ``t`` was declared pinned."""
    if t.device.type != "cpu" or t.layout is not torch.strided:
        return False
    ref = _pinned.get(t.untyped_storage()._cdata)
    return ref is not None and not ref.expired()


def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    """``Tensor.pin_memory``: a pinned copy, or the tensor itself if it is pinned."""
    if self.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
    return self if is_pinned(self) else pin(self.clone(memory_format=torch.preserve_format))


def taking_pin_memory(function: Any) -> Any:
    """``function``, a factory, with a ``pin_memory`` that needs no CUDA."""

    @functools.wraps(function)
    def make(*args: Any, pin_memory: bool | None = False, **kwargs: Any) -> torch.Tensor:
        made = function(*args, **kwargs)
        if not pin_memory:
            return made
        if made.device.type != "cpu":
            raise RuntimeError("Only dense CPU tensors can be pinned")
        return pin(made)

    return make


FACTORIES = ("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "rand", "randn")


def alias(patches: Patches) -> None:
    """Replace PyTorch's pinning, which needs CUDA."""
    patches.set(torch.Tensor, "pin_memory", pin_memory)
    patches.set(torch.Tensor, "is_pinned", lambda self, device=None: is_pinned(self))
    for name in FACTORIES:
        patches.set(torch, name, taking_pin_memory(getattr(torch, name)))
