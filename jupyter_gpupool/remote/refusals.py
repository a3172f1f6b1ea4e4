"""Names of ``torch.cuda`` that have no meaning for a leased slice: each raises one line that says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import names

_SENSORS = "the GPU's sensors are the pool's to read; its panel and `gpupool` show them"
_GRAPHS = "CUDA graphs cannot be captured from here; run the function as it is"
_ALLOCATOR = "memory is handed out by the worker; leave PyTorch's allocator as it is"
_ADDRESSES = "a handle of the GPU server's CUDA means nothing in this process"

REFUSED: dict[str, str] = {
    "temperature": _SENSORS,
    "power_draw": _SENSORS,
    "clock_rate": _SENSORS,
    "utilization": _SENSORS,
    "memory_usage": _SENSORS,
    "list_gpu_processes": _SENSORS,
    "CUDAGraph": _GRAPHS,
    "graph": _GRAPHS,
    "graph_pool_handle": _GRAPHS,
    "make_graphed_callables": _GRAPHS,
    "caching_allocator_alloc": _ALLOCATOR,
    "caching_allocator_delete": _ALLOCATOR,
    "caching_allocator_enable": _ALLOCATOR,
    "caching_allocator_disabled": _ALLOCATOR,
    "CUDAPluggableAllocator": _ALLOCATOR,
    "change_current_allocator": _ALLOCATOR,
    "MemPool": _ALLOCATOR,
    "use_mem_pool": _ALLOCATOR,
    "memory_snapshot": _ALLOCATOR,
    "host_memory_stats": "host memory is not the device's; ask the operating system",
    "host_memory_stats_as_nested_dict": "host memory is not the device's; ask the operating system",
    "reset_accumulated_host_memory_stats": "host memory is not the device's; ask the operating system",
    "reset_peak_host_memory_stats": "host memory is not the device's; ask the operating system",
    "cudart": _ADDRESSES,
    "check_error": _ADDRESSES,
    "current_blas_handle": _ADDRESSES,
    "current_solver_handle": _ADDRESSES,
    "ExternalStream": _ADDRESSES,
    "get_stream_from_external": _ADDRESSES,
    "GreenContext": "a slice is the share that was leased; it cannot be divided further from here",
    "set_sync_debug_mode": "waits are not watched here; see `gpupool` for what a lease does",
    "get_sync_debug_mode": "waits are not watched here; see `gpupool` for what a lease does",
}


def refusals() -> dict[str, Any]:
    """For each refused name what raises RuntimeError with one line when it is called; classes stay classes."""
    found: dict[str, Any] = {}
    for name, reason in REFUSED.items():
        refuse = _refusal(name, reason)
        found[name] = (
            type(name, (), {"__new__": refuse, "__module__": "torch.cuda"})
            if isinstance(getattr(torch.cuda, name, None), type)
            else refuse
        )
    return found


def _refusal(name: str, reason: str) -> Callable:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"torch.cuda.{name} is not available on a leased GPU: {reason}")

    refuse.__name__ = name
    return refuse


def alone(native: Callable) -> Callable:
    """``init_process_group``, which has no transport between slices: one line instead of a puzzle."""

    @functools.wraps(native)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        place = kwargs.get("device_id")
        if "nccl" in str(backend).lower() or (place is not None and names.slice_index(place) is not None):
            raise RuntimeError(
                "processes cannot exchange tensors of leased GPUs (torch.distributed with NCCL); use one device "
                "(devices=1), or nn.DataParallel for all of them in one process"
            )
        return native(backend, *args, **kwargs)

    return init_process_group


class Ranges:
    """NVTX's annotations, for which no profiler listens here: they nest and do nothing else, as without one."""

    def __init__(self) -> None:
        self._depth = 0

    def rangePushA(self, message: str) -> int:
        self._depth += 1
        return self._depth - 1

    def rangePop(self) -> int:
        self._depth -= 1
        return self._depth

    def markA(self, message: str) -> None:
        pass

    def rangeStartA(self, message: str) -> int:
        return 0

    def rangeEnd(self, range_id: int) -> None:
        pass
