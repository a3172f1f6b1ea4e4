"""Registers ``gpupool`` with PyTorch as its PrivateUse1 device: the module ``torch.gpupool``, kernels that
allocate, and hooks for autograd."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment, copies, nested, sparse
from jupyter_gpupool.pytorch.client.tensor import data_attribute, device_names, subclasses
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.protocol.commands import SEED, SEED_BITS
from jupyter_gpupool.pytorch.torch_internals.client import DeviceHooksBase, setup_device

from . import (
    attention,
    autocast,
    autograd,
    generators,
    optimizers,
    process_sharing,
    recurrent,
    serialization,
    storages,
)

#: Set in a fork of an attached process, where the device cannot be used.
in_fork = False

_registered = False
_libraries: list[torch.library.Library] = []


class GPUPoolModule:
    """``torch.gpupool``, the device's module, with the functions that ``torch.cuda`` has. Memory is in bytes."""

    __name__ = "torch.gpupool"  # programs ask any device's module for it

    def is_initialized(self) -> bool:
        """Whether this process has used a slice or chosen one: as with CUDA, forks that use GPUs begin before."""
        session = attachment.current()
        return device_names.chosen or (session is not None and session.connected)

    def is_available(self) -> bool:
        """Whether a lease is attached to this process, of which CUDA_VISIBLE_DEVICES leaves a slice."""
        device_names.refresh()
        return device_names.visible_count() > 0

    def _is_in_bad_fork(self) -> bool:
        return in_fork

    def device_count(self) -> int:
        """The number of slices that CUDA_VISIBLE_DEVICES leaves."""
        device_names.refresh()
        return device_names.visible_count()

    def current_device(self) -> int:
        """The number of the calling thread's current slice."""
        return device_names.current_index()

    def set_device(self, device: Any) -> None:
        """Make a slice the calling thread's current one. Raises RuntimeError if the lease does not have it."""
        index = device_names.slice_index(device)
        if index is not None:
            device_names.set_current_index(index)

    def synchronize(self, device: Any = None) -> None:
        """Wait until everything called so far has run, and raise the error of an earlier operator.

        Without a device, wait on every server of the lease.
        """
        if device is not None:
            attachment.stream(_index(device)).wait(_index(device))
            return
        for stream in attachment.streams():
            stream.wait(_index(None) if _index(None) in stream.memory else -1)

    # -- random numbers

    def manual_seed(self, seed: int) -> None:
        """Seed the current slice."""
        generators.default(device_names.current_index()).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed every slice with the same number."""
        seed_all(int(seed))

    def initial_seed(self) -> int:
        """The number that the current slice was last seeded with."""
        current = attachment.current()
        if current is not None and not current.connected:
            return current.seed
        return generators.default(device_names.current_index()).initial_seed()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """The random state of a slice, a one-dimensional uint8 tensor on the CPU."""
        return generators.default(_index(device)).get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        """Set the random state of a slice to what :meth:`get_rng_state` returned."""
        generators.default(_index(device)).set_state(new_state)

    # -- memory

    def memory_allocated(self, device: Any = None) -> int:
        """The bytes that this process has allocated on a slice."""
        return _memory(device).allocated()

    def max_memory_allocated(self, device: Any = None) -> int:
        """The most bytes that this process had allocated on a slice at once."""
        return _memory(device).peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Start :meth:`max_memory_allocated` again from what is allocated now."""
        _memory(device).reset_peak()

    def reset_accumulated_memory_stats(self, device: Any = None) -> None:
        """Start the totals of allocated and freed memory again from 0."""
        _memory(device).reset_totals()

    def empty_cache(self) -> None:
        """Does nothing: freed memory is not cached."""

    # -- mixed precision

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The dtypes that autocast can cast to."""
        return [torch.float16, torch.bfloat16]


module = GPUPoolModule()


def _index(device: Any) -> int:
    index = device_names.slice_index(device) if device is not None else None
    return device_names.current_index() if index is None else index


def _memory(device: Any) -> Any:
    return attachment.attached().memory(_index(device))


def seed_all(seed: int) -> None:
    """Seed every slice with the same number, so that each draws the same numbers."""
    current = attachment.current()
    if current is None:
        return
    current.seed = seed
    if current.connected:
        for stream in current.streams():
            stream.push((SEED, seed & SEED_BITS, -1))


# -- registration


class _Hooks(DeviceHooksBase):  # type: ignore[misc]
    def is_available(self) -> bool:
        return device_names.count > 0

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def _empty(
    size: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:
    stride = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format).stride()
    return copies.empty(attachment.dispatcher(_index(device)), size, stride, dtype, device)


def _empty_strided(
    size: Any,
    stride: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> torch.Tensor:
    return copies.empty(attachment.dispatcher(_index(device)), size, stride, dtype, device)


def _zeros(size: Any, dtype: torch.dtype | None = None, device: Any = None, **ignored: Any) -> torch.Tensor:
    """Zeros that forward-mode differentiation starts from; PyTorch's own have no memory, these have."""
    return torch.zeros(size, dtype=dtype, device=device)


def _value(self: torch.Tensor) -> Any:
    """The value of a tensor in ``torch.tensor([a, b])``, which does not call ``__torch_dispatch__``."""
    return attachment.call(torch.ops.aten._local_scalar_dense.default, (self,), {})


def _on_host_first(function: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """Compute on the CPU and copy: cheaper than to send the call."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    return function(*args, device="cpu", **given).to(device)


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not (isinstance(source, RemoteTensor) or isinstance(destination, RemoteTensor)):
        nested.refuse()  # where PyTorch was built with CUDA, its core copies the memory of nested tensors
    return attachment.call(torch.ops.aten.copy_.default, (destination, source), {})


def register() -> None:
    """Register the device with PyTorch. Later calls in the same process do nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    setup_device(BACKEND, module, _Hooks(), autograd.DeviceGuard())
    library = torch.library.Library("aten", "IMPL")
    keys = ["PrivateUse1"]
    if not torch.cuda.device_count():
        # There is no CUDA device here: code that allocates on "cuda", also in C++, gets a tensor on the slice
        # of that number.
        keys.append("CUDA")
    for key in keys:
        for name, kernel in (("empty.memory_format", _empty), ("empty_strided", _empty_strided)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns that CUDA's kernel is replaced
                library.impl(name, kernel, key, allow_override=True)
        library.impl("_copy_from", _copy_from, key)
    for name in ("tril_indices", "triu_indices"):
        library.impl(name, functools.partial(_on_host_first, getattr(torch, name)), "PrivateUse1")
    library.impl("_efficientzerotensor", _zeros, "PrivateUse1")
    library.impl("_local_scalar_dense", _value, "PrivateUse1")
    _libraries.extend(
        (
            library,
            attention.register(),
            recurrent.register(),
            *autocast.register(),
            sparse.register(),
            nested.register(),
        )
    )
    autograd.register()
    subclasses.register()
    data_attribute.register()
    storages.register()
    serialization.register()
    process_sharing.register()
    optimizers.register()
