"""Lets PyTorch's tracers use remote tensors, and fake tensors on ``cuda``.

``torch.export``, ``make_fx``, AOTAutograd and FakeTensorMode describe tensors by fake ones, which have a layout
and no memory. Two things need help:

- PyTorch's core cannot differentiate tensors on ``cuda`` where it was built without CUDA: it aborts the process.
  So a fake tensor is on ``gpupool`` in the core, and the program sees it on ``cuda``.
- A remote tensor has a dispatch of its own, and the tracers leave such tensors to it. They trace it as a plain
  tensor instead.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor, Storage
from jupyter_gpupool.pytorch.torch_internals.client import (
    FAKE_DEVICE,
    HAS_OWN_DISPATCH,
    MAKE_WRAPPER_SUBCLASS,
    FakeTensor,
    FakeTensorMode,
    FunctionalTensor,
    MetaTensorDescriber,
)

_installed = False
_twins: weakref.WeakKeyDictionary[Storage, Any] = weakref.WeakKeyDictionary()
_describing = threading.RLock()


def in_core(device: Any) -> Any:
    """The device that PyTorch's core gets for ``device``: ``gpupool:N`` for ``cuda:N``."""
    named = torch.device(device) if isinstance(device, str) else device
    if not device_names.says_cuda(named):
        return device
    return torch.device(BACKEND, device_names.slice_index(named) or 0)


def shown(device: torch.device) -> torch.device:
    """The device that the program sees for the core's ``device``: ``cuda:N`` for ``gpupool:N``."""
    if device.type == BACKEND and device_names.cuda_is_ours:
        return torch.device("cuda", device.index or 0)
    return device


# -- fake tensors on "cuda"


def _new_fake(cls: type, *args: Any, **kwargs: Any) -> Any:
    """``FakeTensor(mode, elem, device, …)`` or ``FakeTensor(elem, fake_device=…, …)``."""
    args = (*args[:2], *map(in_core, args[2:3]), *args[3:])
    kwargs = {name: in_core(value) if name in FAKE_DEVICE else value for name, value in kwargs.items()}
    return _torch_new_fake(cls, *args, **kwargs)


def _device_of_fake(self: Any) -> torch.device:
    return shown(_torch_device_of_fake(self))


def _avoid_device_init(self: Any) -> bool:
    """Whether ``torch.tensor(…, device="cuda")`` makes a fake tensor without making a real one first."""
    return device_names.count > 0 or _torch_avoid_device_init(self)


def _make_wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Wrappers, such as those that trace changes in place, are on the device of what they wrap."""
    args = tuple(in_core(v) if isinstance(v, torch.device) else v for v in args)
    if "device" in kwargs:
        kwargs["device"] = in_core(kwargs["device"])
    return _torch_make_wrapper(cls, *args, **kwargs)


# -- remote tensors


def _has_own_dispatch(x: object) -> bool:
    return type(x) is not RemoteTensor and _torch_has_own_dispatch(x)


def _describe_tensor(self: Any, t: torch.Tensor, **kwargs: Any) -> Any:
    if type(t) is not RemoteTensor:
        return _torch_describe_tensor(self, t, **kwargs)
    with _describing:
        before = RemoteTensor.untyped_storage
        RemoteTensor.untyped_storage = _twin  # type: ignore[assignment, method-assign]
        try:
            return _torch_describe_tensor(self, t, **kwargs)
        finally:
            RemoteTensor.untyped_storage = before  # type: ignore[method-assign]


def _twin(t: RemoteTensor) -> Any:
    """A meta storage, the same for all tensors on one storage. ``untyped_storage()`` itself copies every byte."""
    twin = _twins.get(t._storage)
    if twin is None:
        blank = torch.empty(t._storage.nbytes, dtype=torch.uint8, device="meta")
        twin = _twins[t._storage] = blank.untyped_storage()
    return twin


_torch_new_fake: Any = FakeTensor.__new__
_torch_device_of_fake: Any = FakeTensor.device.fget
_torch_avoid_device_init: Any = FakeTensorMode.avoid_device_init.fget
_torch_make_wrapper = MAKE_WRAPPER_SUBCLASS.value
_torch_has_own_dispatch = HAS_OWN_DISPATCH.value
_torch_describe_tensor: Any = MetaTensorDescriber.describe_tensor


def install() -> None:
    """Replace what is named above. Without a lease, the replacements do what PyTorch's own do."""
    global _installed
    if _installed:
        return
    _installed = True
    FakeTensor.__new__ = staticmethod(_new_fake)
    FakeTensor.device = property(_device_of_fake, FakeTensor.device.fset)
    FunctionalTensor.device = property(lambda self: shown(torch.Tensor.device.__get__(self)))
    for traced in (FakeTensor, FunctionalTensor):
        traced.is_cuda = property(lambda self: self.device.type == "cuda")
    FakeTensorMode.avoid_device_init = property(_avoid_device_init)
    setattr(*MAKE_WRAPPER_SUBCLASS, staticmethod(functools.wraps(_torch_make_wrapper)(_make_wrapper)))
    setattr(*HAS_OWN_DISPATCH, _has_own_dispatch)
    MetaTensorDescriber.describe_tensor = _describe_tensor
    proxy_tensor.HANDLED_TYPES = (*proxy_tensor.HANDLED_TYPES, RemoteTensor)  # type: ignore[assignment]
