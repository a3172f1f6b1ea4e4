"""``cuda`` means the pool: where a process has no CUDA device of its own, ``torch.cuda`` and the
device names ``cuda`` and ``cuda:N`` answer for the lease's slices."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._device

from . import autocast, collectives, generators, legacy, names, pinning, sequences, streams
from .device import module as gpupool
from .names import BACKEND
from .patches import Patches
from .queries import Queries, device
from .refusals import Ranges, alone, refusals
from .specs import AttachSpec, DeviceSpec

_patches = Patches()
_answering: list[Queries] = []


def cap_memory(spec: AttachSpec) -> None:
    """Direct attachment: the slices are this machine's own GPUs, which CUDA_VISIBLE_DEVICES already
    selects; keep PyTorch within the memory that was granted. Raises RuntimeError without CUDA."""
    if torch.cuda.device_count() < len(spec.devices):
        raise RuntimeError(
            f"direct attachment needs {len(spec.devices)} CUDA devices in this process, but PyTorch sees "
            f"{torch.cuda.device_count()}; use --attach remote"
        )
    for d in spec.devices:
        found = str(getattr(torch.cuda.get_device_properties(d.index), "uuid", ""))
        if d.uuid.startswith("GPU-") and len(found) == 36 and found not in d.uuid:
            # CUDA reads CUDA_VISIBLE_DEVICES once in a process.
            raise RuntimeError(
                f"this process has used another GPU than the granted one ({d.uuid}), and CUDA keeps to the first; "
                "start a new process (restart the kernel), or attach remotely"
            )
    for d in spec.devices:
        torch.cuda.set_per_process_memory_fraction(d.limit_mib / d.total_mib, d.index)


def close_memory(spec: AttachSpec) -> None:
    """Direct attachment, released: this process allocates nothing more on GPUs that may be somebody else's now."""
    torch.cuda.empty_cache()
    for d in spec.devices:
        torch.cuda.set_per_process_memory_fraction(0.0, d.index)


def resize(devices: Sequence[DeviceSpec]) -> None:
    """What is said of the slices' memory follows their new limits."""
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
    autocast.keep_cache_true(_patches)
    sequences.alias(_patches)
    _patches.set(torch, "Generator", generators.Facade)
    _patches.set(torch, "Stream", streams.facade(torch.Stream, streams.Stream, streams.CudaStream))
    _patches.set(torch, "Event", streams.facade(torch.Event, streams.Event, streams.CudaEvent))
    if torch.cuda.device_count():
        return
    # DeviceContext compares against PyTorch's own functions: let it collect them before they are wrapped.
    torch.utils._device._device_constructors()
    names.cuda_is_ours = True
    _answering.append(Queries(devices, cuda=True))
    answers = {**refusals(), **_answering[-1].by_name()}
    for owner in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams, torch.cuda.graphs):
        for name, function in answers.items():
            if (owner is torch.cuda and hasattr(owner, name)) or name in vars(owner):
                _patches.set(owner, name, function)
    _patches.set(torch.cuda.nvtx, "_nvtx", Ranges())
    if torch.distributed.is_available():
        together = alone(torch.distributed.init_process_group)
        for owner in (torch.distributed, torch.distributed.distributed_c10d):
            _patches.set(owner, "init_process_group", together)
    autocast.alias(_patches)
    collectives.alias(_patches)
    pinning.alias(_patches)
    legacy.alias(_patches)
    _patches.set(torch.Tensor, "to", _with_index(torch.Tensor.to, first=1))
    _patches.set(torch.Tensor, "cuda", _tensor_cuda)
    # The worker's PyTorch chooses its kernels; what is installed here says nothing of them.
    cudnn = sys.modules["torch.backends.cudnn"].m  # the module itself, which a class stands in for
    _patches.set(cudnn, "is_acceptable", lambda tensor: False)
    _patches.set(cudnn, "_init", lambda: False)
    for owner in (torch.utils.dlpack, torch):
        _patches.set(owner, "to_dlpack", _to_dlpack(torch.to_dlpack))
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


def _patch_accelerator(queries: Queries) -> None:
    for name, function in {
        "synchronize": gpupool.synchronize,
        "current_stream": streams.current_stream,
        "set_stream": streams.set_stream,
        "device_index": device,
        "get_memory_info": lambda device_index=None: queries.memory_info(device_index),
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
        "reset_accumulated_memory_stats": gpupool.reset_accumulated_memory_stats,
        "memory_stats": lambda device_index=None: _flat(queries.memory_statistics(device_index)),
    }.items():
        if hasattr(torch.accelerator, name):
            # The compiler tells functions apart by identity: one function must not have two names.
            _patches.set(torch.accelerator, name, _another(function))


def _to_dlpack(native: Callable) -> Callable:
    def to_dlpack(tensor: torch.Tensor) -> Any:
        return tensor.__dlpack__() if getattr(tensor, "is_gpupool", False) else native(tensor)

    return to_dlpack


def _another(function: Any) -> Any:
    if isinstance(function, type):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"a.b": 1}``, as PyTorch spells memory statistics."""
    found: dict[str, Any] = {}
    for name, value in sorted(nested.items()):
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
