"""Registers ``gpupool`` with PyTorch as its PrivateUse1 device: the module ``torch.gpupool``, the
allocation kernels, and what autograd needs to know."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import attention, autocast, backward, connection, generators, names, operators, optimizers, saving
from . import reshape as _reshape  # noqa: F401  registers its operators
from .names import BACKEND
from .records import SEED, SEED_BITS

#: Set in a fork of an attached process, where the device cannot be used.
in_fork = False

_registered = False
_libraries: list[torch.library.Library] = []


class GPUPoolModule:
    """``torch.gpupool``: what PyTorch and programs ask of a device module. Memory is in bytes."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return names.count > 0

    def _is_in_bad_fork(self) -> bool:
        return in_fork

    def device_count(self) -> int:
        return names.count

    def current_device(self) -> int:
        return names.current_index()

    def set_device(self, device: Any) -> None:
        index = names.slice_index(device)
        if index is not None:
            names.set_current_index(index)

    def synchronize(self, device: Any = None) -> None:
        """Wait until everything issued so far is done; errors of earlier operators are raised here. Without a device,
        on every server that the lease has slices on."""
        if device is not None:
            connection.stream(_index(device)).wait(_index(device))
            return
        for stream in connection.streams():
            stream.wait(_index(None) if _index(None) in stream.memory else -1)

    # -- random numbers

    def manual_seed(self, seed: int) -> None:
        generators.default(names.current_index()).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        seed_all(int(seed))

    def initial_seed(self) -> int:
        current = connection.current()
        if current is not None and not current.connected:
            return current.seed
        return generators.default(names.current_index()).initial_seed()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return generators.default(_index(device)).get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        generators.default(_index(device)).set_state(new_state)

    # -- memory

    def memory_allocated(self, device: Any = None) -> int:
        return _memory(device).allocated()

    def max_memory_allocated(self, device: Any = None) -> int:
        return _memory(device).peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _memory(device).reset_peak()

    def reset_accumulated_memory_stats(self, device: Any = None) -> None:
        _memory(device).reset_totals()

    def empty_cache(self) -> None:
        """Freed storages go back at once; nothing is cached."""

    # -- mixed precision

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


module = GPUPoolModule()


def _index(device: Any) -> int:
    index = names.slice_index(device) if device is not None else None
    return names.current_index() if index is None else index


def _memory(device: Any) -> Any:
    return connection.attached().memory(_index(device))


def seed_all(seed: int) -> None:
    """Seed every slice alike, so that a seed gives the same numbers on any of them."""
    current = connection.current()
    if current is None:
        return
    current.seed = seed
    if current.connected:
        for stream in current.streams():
            stream.push((SEED, seed & SEED_BITS, -1))


# -- registration


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return names.count > 0

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
    return operators.empty(connection.dispatcher(_index(device)), size, stride, dtype, device)


def _empty_strided(
    size: Any,
    stride: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> torch.Tensor:
    return operators.empty(connection.dispatcher(_index(device)), size, stride, dtype, device)


def _zeros(size: Any, dtype: torch.dtype | None = None, device: Any = None, **ignored: Any) -> torch.Tensor:
    """What forward-mode differentiation starts from; real zeros serve as well as the idea of them."""
    return torch.zeros(size, dtype=dtype, device=device)


def _value(self: torch.Tensor) -> Any:
    """For ``torch.tensor([a, b])`` of tensors, which asks below where subclasses are asked."""
    return connection.call(torch.ops.aten._local_scalar_dense.default, (self,), {})


def _on_host_first(function: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """What is cheaper to make here than to describe."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    return function(*args, device="cpu", **given).to(device)


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return connection.call(torch.ops.aten.copy_.default, (destination, source), {})


def register() -> None:
    """Tell PyTorch of the device; once per process, harmless afterwards."""
    global _registered
    if _registered:
        return
    _registered = True
    _setup_privateuseone_for_python_backend(BACKEND, module, _Hooks(), backward.DeviceGuard())
    library = torch.library.Library("aten", "IMPL")
    keys = ["PrivateUse1"]
    if not torch.cuda.device_count():
        # No CUDA here, be PyTorch built for it or not: any code, C++ included, that allocates on "cuda" gets
        # a tensor on the slice of that number.
        keys.append("CUDA")
    for key in keys:
        for name, kernel in (("empty.memory_format", _empty), ("empty_strided", _empty_strided)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that CUDA's own is replaced is the point
                library.impl(name, kernel, key, allow_override=True)
        library.impl("_copy_from", _copy_from, key)
    for name in ("tril_indices", "triu_indices"):
        library.impl(name, functools.partial(_on_host_first, getattr(torch, name)), "PrivateUse1")
    library.impl("_efficientzerotensor", _zeros, "PrivateUse1")
    library.impl("_local_scalar_dense", _value, "PrivateUse1")
    _libraries.extend((library, attention.register(), *autocast.register()))
    backward.register()
    saving.register()
    optimizers.register()
    # Otherwise Module.to() would give tied parameters storages of their own.
    torch.__future__.set_swap_module_params_on_conversion(True)
