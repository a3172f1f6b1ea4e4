"""``torch.distributed`` with leased GPUs: gloo carries what is the host's, and answers to NCCL's name.

A program asks for ``nccl``, or for nothing, which with CUDA means NCCL for tensors on GPUs. A client has no NCCL;
dispatch/worker_collectives.py stands in its place for leased tensors.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment, point_to_point, worker_collectives
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.torch_internals.client import COALESCING, describe_failed_call, set_group_timeout

from . import pinned_memory


def alias(patches: Patches) -> None:
    """Let process groups be made for leased tensors."""
    dist = torch.distributed
    if not dist.is_available():
        return
    replaced = {
        "init_process_group": _first(dist.init_process_group),
        "new_group": _another(dist.new_group),
        "get_backend": _named(dist.get_backend),
        "destroy_process_group": _finished(dist.destroy_process_group),
    }
    natives = {name: getattr(dist, name) for name in replaced}
    # Its modules import these from one another. What is imported later gets what is there then.
    for owner in [m for name, m in sys.modules.items() if f"{name}.".startswith(f"{dist.__name__}.")]:
        for name, function in replaced.items():
            if vars(owner).get(name) is natives[name]:
                patches.set(owner, name, function)
    # Programs ask there. c10d's own code, which asks in its own module, goes on to what only a build with NCCL has.
    patches.set(dist, "is_nccl_available", lambda: True)
    if not hasattr(dist, "ProcessGroupNCCL"):
        patches.set(dist, "ProcessGroupNCCL", _ProcessGroupNCCL)
    for place, function in zip(COALESCING, (_begun, _ended), strict=True):
        if place.owner is not None:
            patches.set(*place, function(place.value))
    patches.set(dist.Work, "wait", _waits(dist.Work.wait))
    if set_group_timeout.owner is not None:
        patches.set(*set_group_timeout, _with_timeout(set_group_timeout.value))
    if describe_failed_call.owner is not None:
        patches.set(*describe_failed_call, _without_version(describe_failed_call.value))


class _Options:
    """Options of NCCL's process groups. Programs set what they like, and nothing reads it."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.config = SimpleNamespace()


class _ProcessGroupNCCL:
    """What programs that found NCCL available take options from, where this PyTorch was built without it."""

    Options = _Options
    NCCLConfig = SimpleNamespace

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "a process has no NCCL for leased GPUs; make the process group with init_process_group or new_group"
        )


def _wants_nccl(backend: Any) -> bool:
    return backend is None or "nccl" in str(backend).lower()


def _seconds(timeout: Any) -> float:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else worker_collectives.DEFAULT_TIMEOUT_S


def _first(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        pinned_memory.pin_in_core()
        place = kwargs.get("device_id")
        if place is not None and device_names.slice_index(place) is not None:
            kwargs["device_id"] = None  # gloo is bound to no GPU
        if not _wants_nccl(backend):
            return native(backend, *args, **kwargs)
        found = native("gloo", *args, **{**kwargs, "pg_options": None})
        timeout = args[1] if len(args) > 1 else kwargs.get("timeout")
        worker_collectives.begin_world(torch.distributed.group.WORLD, _seconds(timeout))
        return found

    return init_process_group


def _another(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def new_group(
        ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        world = torch.distributed.group.WORLD
        stands_in = worker_collectives.stands_in(world) if backend is None else _wants_nccl(backend)
        if stands_in:
            backend = "gloo"
            args = (None, *args[1:]) if args else args
            kwargs.update({name: None for name in ("pg_options", "device_id") if name in kwargs})  # NCCL's
        made = native(ranks, timeout, backend, *args, **kwargs)
        if stands_in and isinstance(made, torch.distributed.ProcessGroup):
            worker_collectives.stand_in(made, _seconds(timeout))
        return made

    return new_group


def _finished(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def destroy_process_group(group: Any = None) -> None:
        """As NCCL does, let collectives end first: a rank that leaves takes no part in what it has begun."""
        session = attachment.current()
        asked = worker_collectives.stands_in(group or torch.distributed.group.WORLD)
        if asked and session is not None and session.connected:
            for stream in session.streams():
                stream.wait()
        native(group)

    return destroy_process_group


def _begun(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def _start_coalescing(pg: Any, device: Any) -> None:
        if worker_collectives.stands_in(pg) and device_names.slice_index(device) is not None:
            point_to_point.begin_several(pg)
        else:
            native(pg, device)

    return _start_coalescing


def _ended(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def _end_coalescing(pg: Any, device: Any) -> Any:
        if worker_collectives.stands_in(pg) and device_names.slice_index(device) is not None:
            return point_to_point.end_several(pg)
        return native(pg, device)

    return _end_coalescing


def _with_timeout(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def _set_pg_timeout(timeout: timedelta, group: Any = None) -> None:
        native(timeout, group)
        worker_collectives.set_timeout(group or torch.distributed.group.WORLD, timeout.total_seconds())

    return _set_pg_timeout


def _without_version(native: Callable[..., Any]) -> Callable[..., Any]:
    """What c10d notes of a call that failed, where it would ask NCCL for its version: that error hid the real one."""

    @functools.wraps(native)
    def describe(*args: Any, **kwargs: Any) -> Any:
        try:
            return native(*args, **kwargs)
        except RuntimeError:
            return {"func_name": args[0] if args else kwargs.get("func_name")}

    return describe


def _waits(native: Callable[..., Any]) -> Callable[..., Any]:
    """``Work.wait()`` that takes a timeout, which c10d refuses for works like those of leased tensors."""

    @functools.wraps(native)
    def wait(work: Any, timeout: timedelta | None = None) -> Any:
        if not timeout:
            return native(work)
        try:
            return native(work, timeout)
        except RuntimeError as e:
            if "finite timeout" not in str(e):
                raise
        done = threading.Event()
        work.get_future().add_done_callback(lambda _: done.set())
        if not done.wait(timeout.total_seconds()):
            raise RuntimeError(f"no answer of the other rank within {timeout.total_seconds():g} s")
        return native(work)

    return wait


def _named(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def get_backend(group: Any = None) -> Any:
        name = native(group)
        return "nccl" if worker_collectives.stands_in(group or torch.distributed.group.WORLD) else name

    return get_backend
