"""Pinned host memory, as far as programs can see it.

What ``pin_memory()`` gives is a copy that says it is pinned. Its memory is not locked: copies to a
slice go through a connection, which gains nothing by that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .patches import Patches

#: Pinned storages by their address in PyTorch. A weak reference keeps that address from being used again.
_pinned: dict[int, StorageWeakRef] = {}
_limit = 1024


def pin(t: torch.Tensor) -> torch.Tensor:
    """Declare the memory of ``t`` pinned."""
    global _limit
    if len(_pinned) >= _limit:
        for address in [a for a, ref in _pinned.items() if ref.expired()]:
            del _pinned[address]
        _limit = max(1024, 2 * len(_pinned))
    storage = t.untyped_storage()
    _pinned[storage._cdata] = StorageWeakRef(storage)
    return t


def is_pinned(t: torch.Tensor) -> bool:
    if t.device.type != "cpu" or t.layout is not torch.strided:
        return False
    ref = _pinned.get(t.untyped_storage()._cdata)
    return ref is not None and not ref.expired()


def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    if self.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
    return self if is_pinned(self) else pin(self.clone(memory_format=torch.preserve_format))


@functools.cache  # the same each time: the compiler knows functions by identity
def taking_pin_memory(function: Any) -> Any:
    """A factory whose argument ``pin_memory`` PyTorch's core would ask CUDA for."""

    @functools.wraps(function)
    def make(*args: Any, pin_memory: bool | None = False, **kwargs: Any) -> torch.Tensor:
        made = function(*args, **kwargs)
        if not pin_memory:
            return made
        if made.device.type != "cpu":
            raise RuntimeError("Only dense CPU tensors can be pinned")
        return pin(made)

    return make


FACTORIES = ("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "rand", "randn", "tensor")


def alias(patches: Patches) -> None:
    patches.set(torch.Tensor, "pin_memory", pin_memory)
    patches.set(torch.Tensor, "is_pinned", lambda self, device=None: is_pinned(self))
    for name in FACTORIES:
        patches.set(torch, name, taking_pin_memory(getattr(torch, name)))
