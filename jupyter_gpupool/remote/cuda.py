"""``cuda`` means the pool: where a process has no CUDA device of its own, ``torch.cuda`` and the
device names ``cuda`` and ``cuda:N`` answer for the lease's slices."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._device

from . import autocast, connection, names
from .device import module as gpupool
from .names import BACKEND
from .patches import Patches
from .specs import AttachSpec, DeviceSpec

_patches = Patches()

#: What an emulated GPU says of itself beside its name and memory: a V100's compute capability.
_EMULATED = {"major": 7, "minor": 0, "multi_processor_count": 80}


def cap_memory(spec: AttachSpec) -> None:
    """Direct attachment: the slices are this machine's own GPUs, which CUDA_VISIBLE_DEVICES already
    selects; keep PyTorch within the memory that was granted. Raises RuntimeError without CUDA."""
    if torch.cuda.device_count() < len(spec.devices):
        raise RuntimeError(
            f"direct attachment needs {len(spec.devices)} CUDA devices in this process, but PyTorch sees "
            f"{torch.cuda.device_count()}; use --attach remote"
        )
    for d in spec.devices:
        torch.cuda.set_per_process_memory_fraction(d.limit_mib / d.total_mib, d.index)


class device:
    """Context manager that selects a slice; stands in for :class:`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.idx = names.slice_index(device) if device is not None else None
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = names.current_index()
        if self.idx is not None:
            names.set_current_index(self.idx)

    def __exit__(self, *error: Any) -> None:
        names.set_current_index(self.prev_idx)


class device_of(device):
    def __init__(self, obj: Any) -> None:
        super().__init__(obj.device if getattr(obj, "is_cuda", False) else None)


def alias(devices: Sequence[DeviceSpec]) -> None:
    """Let ``cuda`` mean the lease's slices, unless the process has CUDA devices of its own."""
    _patch_accelerator()
    autocast.keep_cache_true(_patches)
    if torch.cuda.device_count():
        return
    # DeviceContext compares against PyTorch's own functions: let it collect them before they are wrapped.
    torch.utils._device._device_constructors()
    names.cuda_is_ours = True
    answers = _answers(devices)
    for owner in (torch.cuda, torch.cuda.memory, torch.cuda.random):
        for name, function in answers.items():
            if owner is torch.cuda or name in vars(owner):
                _patches.set(owner, name, function)
    autocast.alias(_patches)
    _patches.set(torch.Tensor, "to", _with_index(torch.Tensor.to, first=1))
    _patches.set(torch.Tensor, "cuda", _tensor_cuda)
    _patches.set(torch.Tensor, "pin_memory", lambda self, device=None: self)
    # The worker's PyTorch chooses its kernels; what is installed here says nothing of them.
    cudnn = sys.modules["torch.backends.cudnn"].m  # the module itself, which a class stands in for
    _patches.set(cudnn, "is_acceptable", lambda tensor: False)
    _patches.set(cudnn, "_init", lambda: False)
    context = torch.utils._device.DeviceContext  # what set_default_device() and `with device:` use
    _patches.set(context, "__init__", _with_index(context.__init__, first=1))
    for name in ("tensor", "as_tensor", "asarray"):
        _patches.set(torch, name, _with_index(getattr(torch, name)))


def unalias() -> None:
    _patches.restore()
    names.cuda_is_ours = False


def _indexed(value: Any) -> Any:
    """``cuda`` without a number names the current device; PyTorch's core would ask CUDA which that is."""
    if isinstance(value, str):
        if not value.startswith("cuda"):
            return value
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type in ("cuda", BACKEND):
        index = names.slice_index(value)
        return torch.device(value.type, index) if index is not None else value
    return value


def _with_index(function: Callable, first: int | None = None) -> Callable:
    """``function`` with its device made explicit: the argument ``device``, or positional ``first``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if first is not None and len(args) > first:
            value = args[first]
            if isinstance(value, int) and not isinstance(value, bool):
                value = torch.device("cuda", value)
            args = (*args[:first], _indexed(value), *args[first + 1 :])
        value = kwargs.get("device")
        if value is not None:
            kwargs["device"] = torch.device("cuda", value) if type(value) is int else _indexed(value)
        return function(*args, **kwargs)

    return call


def _tensor_cuda(
    self: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> torch.Tensor:
    index = names.current_index() if device is None else names.slice_index(device)
    if index is None:
        raise RuntimeError(f"Invalid device, must be cuda device: {device}")
    return self.to(torch.device("cuda", index), non_blocking=non_blocking, **kwargs)


def _patch_accelerator() -> None:
    for name, function in {
        "synchronize": gpupool.synchronize,
        "current_device_index": gpupool.current_device,
        "current_device_idx": gpupool.current_device,
        "set_device_index": gpupool.set_device,
        "set_device_idx": gpupool.set_device,
        "device_count": gpupool.device_count,
        "empty_cache": gpupool.empty_cache,
        "memory_allocated": gpupool.memory_allocated,
        "max_memory_allocated": gpupool.max_memory_allocated,
        "memory_reserved": gpupool.memory_allocated,
        "max_memory_reserved": gpupool.max_memory_allocated,
        "reset_peak_memory_stats": gpupool.reset_peak_memory_stats,
    }.items():
        if hasattr(torch.accelerator, name):
            _patches.set(torch.accelerator, name, function)


def _answers(devices: Sequence[DeviceSpec]) -> dict[str, Callable]:
    """``torch.cuda``'s functions, answered for the slices."""

    def properties(device: Any = None) -> Any:
        spec = devices[_index(device)]
        facts = _EMULATED if spec.emulated else _real_properties(spec.index)
        return types.SimpleNamespace(
            name=spec.name, total_memory=spec.limit_mib << 20, uuid=spec.uuid, is_integrated=False, **facts
        )

    def set_all(states: Any) -> None:
        for index, state in enumerate(states):
            gpupool.set_rng_state(state, index)

    return {
        "is_available": gpupool.is_available,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": gpupool._is_in_bad_fork,
        "device_count": gpupool.device_count,
        "current_device": gpupool.current_device,
        "set_device": gpupool.set_device,
        "device": device,
        "device_of": device_of,
        "synchronize": gpupool.synchronize,
        "get_device_name": lambda device=None: devices[_index(device)].name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (properties(device).major, properties(device).minor),
        "get_arch_list": lambda: ["sm_70"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "can_device_access_peer": lambda a, b: True,
        "manual_seed": gpupool.manual_seed,
        "manual_seed_all": gpupool.manual_seed_all,
        "seed": lambda: gpupool.manual_seed(torch.seed()),
        "seed_all": lambda: gpupool.manual_seed_all(torch.seed()),
        "initial_seed": gpupool.initial_seed,
        "get_rng_state": lambda device="cuda": gpupool.get_rng_state(device),
        "set_rng_state": lambda state, device="cuda": gpupool.set_rng_state(state, device),
        "get_rng_state_all": lambda: [gpupool.get_rng_state(i) for i in range(len(devices))],
        "set_rng_state_all": set_all,
        "memory_allocated": gpupool.memory_allocated,
        "max_memory_allocated": gpupool.max_memory_allocated,
        "memory_reserved": gpupool.memory_allocated,
        "max_memory_reserved": gpupool.max_memory_allocated,
        "reset_peak_memory_stats": gpupool.reset_peak_memory_stats,
        "reset_max_memory_allocated": gpupool.reset_peak_memory_stats,
        "mem_get_info": gpupool.mem_get_info,
        "empty_cache": gpupool.empty_cache,
        "ipc_collect": lambda: None,
        "is_current_stream_capturing": lambda: False,
    }


def _index(device: Any) -> int:
    index = names.slice_index(device) if device is not None else None
    return names.current_index() if index is None else index


def _real_properties(index: int) -> dict[str, Any]:
    current = connection.current()
    assert current is not None
    return current.welcome()["devices"][index]
