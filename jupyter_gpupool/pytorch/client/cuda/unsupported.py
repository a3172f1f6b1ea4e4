"""Names of ``torch.cuda`` that are not supported on a leased GPU: each raises one line with the reason."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.client import JITTED_CALL

_GRAPHS = "CUDA graphs cannot be captured remotely; call the function itself, or use torch.compile"
_ALLOCATOR = "the worker allocates the memory; leave PyTorch's allocator as it is"
_ADDRESSES = "a CUDA handle of the GPU server is of no use in this process; use PyTorch's operators instead"

REFUSED: dict[str, str] = {
    "CUDAGraph": _GRAPHS,
    "graph": _GRAPHS,
    "export_dot": _GRAPHS,
    "export_graph_data": _GRAPHS,
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
    "host_memory_stats": "host memory does not belong to the GPU; ask the operating system",
    "host_memory_stats_as_nested_dict": "host memory does not belong to the GPU; ask the operating system",
    "reset_accumulated_host_memory_stats": "host memory does not belong to the GPU; ask the operating system",
    "reset_peak_host_memory_stats": "host memory does not belong to the GPU; ask the operating system",
    "cudart": _ADDRESSES,
    "check_error": _ADDRESSES,
    "current_blas_handle": _ADDRESSES,
    "current_solver_handle": _ADDRESSES,
    "ExternalStream": _ADDRESSES,
    "get_stream_from_external": _ADDRESSES,
    "GreenContext": "a slice cannot be divided further; request GPUs with less memory",
    "SMPartition": "a slice cannot be divided further; request GPUs with less memory",
    "set_sync_debug_mode": "waits are not monitored; measure with torch.cuda.Event",
    "get_sync_debug_mode": "waits are not monitored; measure with torch.cuda.Event",
}

#: The same of the modules beside it: all their functions, or those named.
_KERNELS = "the worker's PyTorch chooses its kernels; set PYTORCH_TUNABLEOP_ENABLED on the GPU server"
_NCCL = "the slices do not share memory; use torch.cuda.comm, or nn.DataParallel"
_FILES = "a GPU server does not read this machine's files; read them here, and copy with .cuda()"
_WORKSPACES = "the worker's PyTorch sets its workspaces; set CUBLAS_WORKSPACE_CONFIG on the GPU server"
_CODE = "code does not travel to a GPU server; use PyTorch's operators, or torch.compile"
_PLANS = "the worker's PyTorch keeps the plans of its FFTs; leave them as they are"
REFUSED_MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch.cuda.tunable": (_KERNELS, ()),
    "torch.cuda.nccl": (_NCCL, ()),
    "torch.cuda.gds": (_FILES, ()),
    "torch.accelerator": (_GRAPHS, ("Graph",)),
    "torch.backends.cuda": (
        _WORKSPACES,
        ("cublas_workspace_size", "cublaslt_workspace_size", "blas_workspace_size"),
    ),
}


def refused_modules() -> Iterator[tuple[Any, str, Any]]:
    """(module, name, function or class that raises RuntimeError with one line) for :data:`REFUSED_MODULES`."""
    for module_name, (reason, names) in REFUSED_MODULES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue  # an earlier release of PyTorch
        for name in names or module.__all__:
            native = getattr(module, name, None)
            if native is None:
                continue
            refuse = _refused(module_name, name, reason, native)
            # Where it is defined too, by which pickle and inspect find it.
            homes = {module_name: module, native.__module__: sys.modules[native.__module__]}
            yield from (
                (home, name, refuse) for home in homes.values() if getattr(home, name, None) is native
            )
    refuse = _refused("torch.backends.cuda", "cufft_plan_cache", _PLANS, None)
    plans = torch.backends.cuda.cuFFTPlanCache
    yield from ((plans, name, property(refuse, refuse)) for name in ("size", "max_size"))
    yield plans, "clear", refuse
    refuse = _refused("torch.cuda", "jiterator", _CODE, None)
    yield *JITTED_CALL, refuse


def refusals() -> dict[str, Any]:
    """For each refused name a function, or a class, that raises RuntimeError with one line when called."""
    hooks = {name: _GRAPHS for name in vars(torch.cuda.graphs) if name.startswith("register_graph_")}
    contexts = getattr(torch.cuda, "green_contexts", None)  # which has names that torch.cuda has not
    return {
        name: _refused("torch.cuda", name, reason, getattr(torch.cuda, name, getattr(contexts, name, None)))
        for name, reason in {**REFUSED, **hooks}.items()
    }


def _refused(module: str, name: str, reason: str, native: Any) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{module}.{name} is not available on a leased GPU: {reason}")

    if isinstance(native, type):
        made_by = {
            key: staticmethod(refuse)
            for key, value in vars(native).items()
            if isinstance(value, (classmethod, staticmethod)) and not key.startswith("_")
        }
        return type(name, (), {**made_by, "__new__": refuse, "__module__": module})
    return refuse


class Ranges:
    """NVTX annotations: they nest and do nothing else, as without a profiler."""

    def __init__(self) -> None:
        self._depth = 0

    def rangePushA(self, message: str) -> int:
        """Begin a nested range, and return its depth from 0."""
        self._depth += 1
        return self._depth - 1

    def rangePop(self) -> int:
        """End the innermost range, and return its depth."""
        self._depth -= 1
        return self._depth

    def markA(self, message: str) -> None:
        """Does nothing."""
        pass

    def rangeStartA(self, message: str) -> int:
        """Does nothing, and returns 0 for every range."""
        return 0

    def rangeEnd(self, range_id: int) -> None:
        """Does nothing."""
        pass
