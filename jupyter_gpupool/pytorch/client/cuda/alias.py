"""Lets ``cuda`` mean the lease's slices in a process without a CUDA device: the device names ``cuda`` and
``cuda:N``, and the functions of ``torch.cuda``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.device import autocast, generators, profiler, storages, streams
from jupyter_gpupool.pytorch.client.device.registration import module as gpupool
from jupyter_gpupool.pytorch.client.dispatch import nested, packed_sequences, sparse
from jupyter_gpupool.pytorch.client.tensor import data_attribute, device_names, subclasses
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.protocol.sizes import CONTEXT_BYTES
from jupyter_gpupool.pytorch.torch_internals.client import (
    ALLOWED_METHODS,
    CUDNN_INIT,
    DEVICE_EXCHANGES,
    GET_ACCELERATOR,
    GET_STREAM,
    NVTX,
    DeviceContext,
    device_constructors,
)
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from . import collectives, legacy_types, pinned_memory, process_groups, software, torchscript
from .queries import Queries, device, exchange_device
from .unsupported import Ranges, refusals, refused_modules

_patches = Patches()
_answering: list[Queries] = []


def cap_memory(spec: AttachSpec) -> None:
    """Limit PyTorch to the granted memory of directly attached GPUs, which CUDA_VISIBLE_DEVICES selects.

    Raises RuntimeError if PyTorch does not see these GPUs.
    """
    if torch.cuda.device_count() < len(spec.devices):
        raise RuntimeError(
            f"direct attachment needs {len(spec.devices)} CUDA devices in this process, but PyTorch sees "
            f"{torch.cuda.device_count()}; attach remotely (--attach remote)"
        )
    for d in spec.devices:
        found = str(getattr(torch.cuda.get_device_properties(d.index), "uuid", ""))
        if d.uuid.startswith("GPU-") and len(found) == 36 and found not in d.uuid:
            # CUDA reads CUDA_VISIBLE_DEVICES once in a process, so this cannot be changed any more.
            raise RuntimeError(
                f"this process has already used another GPU than the granted one ({d.uuid}), and CUDA cannot change "
                "GPUs within a process; restart the kernel (start a new process), or attach remotely"
            )
    for d in spec.devices:
        # The context is part of the slice. It is not measured here: that would create one in every process.
        allowed = max(0, (d.limit_mib << 20) - CONTEXT_BYTES)
        torch.cuda.set_per_process_memory_fraction(allowed / (d.total_mib << 20), d.index)


def close_memory(spec: AttachSpec) -> None:
    """Stop PyTorch from allocating on directly attached GPUs once they are released to others."""
    torch.cuda.empty_cache()
    for d in spec.devices:
        torch.cuda.set_per_process_memory_fraction(0.0, d.index)


def resize(devices: Sequence[DeviceSpec]) -> None:
    """Answer queries of the slices' memory by their new limits."""
    for queries in _answering:
        queries.resize(devices)


def alias(devices: Sequence[DeviceSpec]) -> None:
    """Let ``cuda`` mean the lease's slices, unless the process has CUDA devices of its own."""
    own = Queries(devices, cuda=False)
    _answering[:] = [own]
    for name, answer in own.by_name().items():
        if not hasattr(gpupool, name):
            _patches.set(gpupool, name, answer)
    _patch_accelerator(own)
    data_attribute.alias(_patches)
    subclasses.alias(_patches)
    storages.alias(_patches)
    autocast.clear_cache_with_torch(_patches)
    packed_sequences.alias(_patches)
    profiler.alias(_patches)
    _patches.set(torch, "Generator", generators.GeneratorType)
    _patches.set(torch, "Stream", streams.facade(torch.Stream, streams.Stream, streams.CudaStream))
    _patches.set(torch, "Event", streams.facade(torch.Event, streams.Event, streams.CudaEvent))
    if torch.cuda.device_count():
        return
    # DeviceContext compares functions with PyTorch's own: let it collect them before they are wrapped.
    device_constructors()
    device_names.cuda_is_ours = True
    _answering.append(Queries(devices, cuda=True))
    answers = {**refusals(), **_answering[-1].by_name()}
    owners = [torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams, torch.cuda.graphs]
    owners += [torch.cuda.green_contexts] if hasattr(torch.cuda, "green_contexts") else []
    for owner in owners:
        for name, function in answers.items():
            if (owner is torch.cuda and hasattr(owner, name)) or name in vars(owner):
                _patches.set(owner, name, function)
    for owner, name in DEVICE_EXCHANGES:
        _patches.set(owner, name, exchange_device)
    for module, name, refuse in refused_modules():
        _patches.set(module, name, refuse)
    software.alias(_patches)
    for name in ("start", "stop"):  # no profiler of CUDA's watches the process
        _patches.set(torch.cuda.profiler, name, lambda: None)
    _patches.set(*NVTX, Ranges())
    process_groups.alias(_patches)
    autocast.alias(_patches)
    collectives.alias(_patches)
    pinned_memory.alias(_patches)
    legacy_types.alias(_patches)
    torchscript.alias(_patches)
    _patches.set(torch.Tensor, "to", _with_index(torch.Tensor.to, first=1))
    # Its own core takes a number for one of the device gpupool.
    _patches.set(torch.nn.Module, "to", _with_index(torch.nn.Module.to, first=1))
    _patches.set(torch.Tensor, "cuda", _tensor_cuda)
    # Uninitialized parameters know the functions that may be called before the first batch by their identity.
    _patches.set(*ALLOWED_METHODS, [*ALLOWED_METHODS.value, torch.Tensor.to, torch.Tensor.cuda])
    # The worker's PyTorch chooses its kernels, whatever cuDNN is installed here.
    cudnn = sys.modules["torch.backends.cudnn"].m  # the module itself; sys.modules has a wrapper
    _patches.set(cudnn, "is_acceptable", lambda tensor: False)
    _patches.set(*CUDNN_INIT, lambda: False)
    # nn.DataParallel compares the device with the accelerator, which is named cuda.
    _patches.set(*GET_STREAM, _copy_stream(GET_STREAM.value))
    for choice in ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention"):
        if hasattr(
            torch.backends.cuda, choice
        ):  # the worker's PyTorch chooses; a CUDA build here has no driver
            _patches.set(torch.backends.cuda, choice, lambda params, debug=False: False)
    to_dlpack = _to_dlpack(torch.to_dlpack)
    for owner in (torch.utils.dlpack, torch):
        _patches.set(owner, "to_dlpack", to_dlpack)
    # What set_default_device() and `with device:` use.
    _patches.set(DeviceContext, "__init__", _with_index(DeviceContext.__init__, first=1))
    for name in ("nested_tensor", "as_nested_tensor"):
        _patches.set(torch.nested, name, nested.refuse_strided(getattr(torch.nested, name)))
    for layout in ("coo", "csr", "csc", "bsr", "bsc", "compressed"):
        name = f"sparse_{layout}_tensor"
        native = getattr(torch, name)
        _patches.set(torch, name, sparse.on_slice(native, 2 if layout == "coo" else 3))
    _patches.set(torch, "tensor", _with_index(pinned_memory.taking_pin_memory(torch.tensor)))
    for name in ("as_tensor", "asarray"):
        _patches.set(torch, name, _with_index(getattr(torch, name)))


def _copy_stream(native: Any) -> Any:
    @functools.wraps(native)
    def stream(device: torch.device) -> Any:
        return native(device) if device_names.slice_index(device) is None else torch.Stream(device.index)

    return stream


def replaced() -> list[tuple[Any, str]]:
    """The places where PyTorch's functions and classes are replaced now: modules or classes, and names."""
    return list(_patches)


def unalias() -> None:
    """Undo :func:`alias`."""
    _patches.restore()
    device_names.cuda_is_ours = False


def _indexed(value: Any) -> Any:
    """``cuda`` → ``cuda:N`` of the current device. PyTorch's core would ask CUDA for N."""
    if isinstance(value, str):
        if not value.startswith("cuda"):
            return value
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type in ("cuda", BACKEND):
        index = device_names.slice_index(value)
        return torch.device(value.type, index) if index is not None else value
    return value


def _with_index(function: Callable[..., Any], first: int | None = None) -> Callable[..., Any]:
    """``function`` with the number of its device filled in: of ``device=``, or of positional argument ``first``."""

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
    index = device_names.current_index() if device is None else device_names.slice_index(device)
    if index is None:
        raise RuntimeError(f"Invalid device, must be cuda device: {device}")
    return self.to(torch.device("cuda", index), non_blocking=non_blocking, **kwargs)


#: What PyTorch's CUDA device computes with.
_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
)


def _patch_accelerator(queries: Queries) -> None:
    def accelerator(check_available: bool = False) -> torch.device:
        return torch.device("cuda" if device_names.cuda_is_ours else BACKEND)

    for name, function in {
        "current_accelerator": accelerator,
        "synchronize": gpupool.synchronize,
        "current_stream": lambda device=None: streams.current_stream(device, device_names.cuda_is_ours),
        "set_stream": streams.set_stream,
        "device_index": type("device_index", (device,), {}),
        "get_memory_info": lambda device_index=None: queries.memory_info(device_index),
        "current_device_index": gpupool.current_device,
        "current_device_idx": gpupool.current_device,
        "set_device_index": gpupool.set_device,
        "set_device_idx": gpupool.set_device,
        "device_count": gpupool.device_count,
        "get_device_capability": lambda device=None: {"supported_dtypes": set(_DTYPES)},
        "empty_cache": gpupool.empty_cache,
        "empty_host_cache": lambda: None,
        "memory_allocated": gpupool.memory_allocated,
        "max_memory_allocated": gpupool.max_memory_allocated,
        "memory_reserved": gpupool.memory_allocated,
        "max_memory_reserved": gpupool.max_memory_allocated,
        "reset_peak_memory_stats": gpupool.reset_peak_memory_stats,
        "reset_accumulated_memory_stats": gpupool.reset_accumulated_memory_stats,
        "memory_stats": lambda device_index=None: _flat(queries.memory_statistics(device_index)),
    }.items():
        for owner in (torch.accelerator, getattr(torch.accelerator, "memory", torch.accelerator)):
            if hasattr(owner, name):
                _patches.set(owner, name, function)
    _patches.set(*GET_ACCELERATOR, accelerator)


def _to_dlpack(native: Callable[..., Any]) -> Callable[..., Any]:
    def to_dlpack(tensor: torch.Tensor) -> Any:
        return tensor.__dlpack__() if getattr(tensor, "is_gpupool", False) else native(tensor)

    return to_dlpack


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"a.b": 1}``, as PyTorch spells memory statistics."""
    found: dict[str, Any] = {}
    for name, value in sorted(nested.items()):
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
