"""Pinned host memory, as far as programs can see it.

``pin_memory()`` returns a copy that reports to be pinned. Its memory is not locked: copies to a slice go
through a connection, which would not become faster.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from jupyter_gpupool.pytorch.client.tensor import device_names
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


_core: list[torch.library.Library] = []


def pin_in_core() -> None:
    """Let PyTorch's core pin memory as well: DistributedDataParallel does, to find parameters that a step left out.

    Costs some microseconds whenever a tensor of the CPU is made by its strides, so only distributed programs have it.
    """
    if _core:
        return
    library = torch.library.Library("aten", "IMPL")
    _core.append(library)
    empty_strided = torch.library.get_kernel("aten::empty_strided", "CPU")
    asked = torch.library.get_kernel("aten::is_pinned", "CPU")

    def empty(keys: Any, size: Any, stride: Any, *, pin_memory: bool | None = None, **options: Any) -> Any:
        ours = bool(pin_memory) and device_names.cuda_is_ours
        made = empty_strided.call_boxed(keys, size, stride, pin_memory=pin_memory and not ours, **options)
        return pin(made) if ours else made

    def pinned(keys: Any, t: torch.Tensor, device: Any = None) -> Any:
        return is_pinned(t) if device_names.cuda_is_ours else asked.call_boxed(keys, t, device)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that kernels are replaced
        library.impl("empty_strided", empty, "CPU", with_keyset=True, allow_override=True)
        library.impl("is_pinned", pinned, "CPU", with_keyset=True, allow_override=True)
