"""``torch.profiler`` on leased GPUs: the worker's own times fill the columns of the device.

PyTorch's C++ would record events of a CUDA that is not there, with a stack trace for each operator. It records the
host alone here. The kernels are added to its results.
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.protocol.commands import TRACE
from jupyter_gpupool.pytorch.torch_internals.client import PARSE_RESULTS, START_TRACE, profiler_state

_KINDS = {"cuda": torch.autograd.DeviceType.CUDA, BACKEND: torch.autograd.DeviceType.PrivateUse1}

#: The event of each operator that reaches __torch_dispatch__.
_SENT = "PythonSubclass"


class _Kernel(NamedTuple):
    """A call in the worker. Times are in seconds of this machine's clock."""

    name: str
    device: int
    start: float
    duration: float


def _trace(on: bool) -> list[_Kernel]:
    """Start or stop to record in every worker, and return what was recorded."""
    kernels = []
    for stream in attachment.streams():
        before = time.time()
        answer = stream.ask((TRACE, int(on)))
        offset = (before + time.time()) / 2 - answer["now"]
        kernels += [
            _Kernel(name.rpartition(".")[0], device, start + offset, duration)
            for name, device, start, duration in answer["calls"]
        ]
    return sorted(kernels, key=lambda k: k.start)


def _add_kernels(events: list[Any], kernels: list[_Kernel], origin: float, kind: str) -> None:
    """Add the kernels to a profile's events, each also to the operator that sent it. ``origin``: its start."""
    waiting: dict[str, deque[_Kernel]] = defaultdict(deque)
    for kernel in kernels:
        waiting[kernel.name].append(kernel)
    open_events: dict[Any, list[Any]] = defaultdict(list)
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        outer = open_events[event.thread]
        while outer and outer[-1].time_range.end < event.time_range.end:
            outer.pop()
        if event.name != _SENT:
            outer.append(event)
        elif outer and waiting[outer[-1].name]:
            kernel = waiting[outer[-1].name].popleft()
            outer[-1].append_kernel(kernel.name, kernel.device, kernel.duration * 1e6)
    for kernel in kernels:
        start_us = (kernel.start - origin) * 1e6
        events.append(
            torch.autograd.profiler_util.FunctionEvent(
                id=-1,
                name=kernel.name,
                thread=0,
                start_us=start_us,
                end_us=start_us + kernel.duration * 1e6,
                stack=[],
                use_device=kind,
                device_type=_KINDS[kind],
                device_index=kernel.device,
            )
        )


def _add_to_trace(path: str, kernels: list[_Kernel]) -> None:
    """Add the kernels to a trace file of Chrome's format."""
    trace = json.loads(Path(path).read_text())
    origin = trace.get("baseTimeNanoseconds", 0) / 1e9
    trace["traceEvents"] += [
        {
            **{"ph": "X", "cat": "kernel", "name": k.name, "pid": k.device, "tid": 0},
            **{
                "ts": (k.start - origin) * 1e6,
                "dur": k.duration * 1e6,
                "args": {"device": k.device, "stream": 0},
            },
        }
        for k in kernels
    ]
    Path(path).write_text(json.dumps(trace))


def alias(patches: Patches) -> None:
    """Let PyTorch's profilers ask the workers."""
    cls = profiler.profile
    begin, start, end = cls.__init__, START_TRACE.value, cls.__exit__
    parse, export = PARSE_RESULTS.value, cls.export_chrome_trace

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        wanted = kwargs.get("use_device")
        ours = wanted in _KINDS or kwargs.get("use_cuda")
        begin(self, *args, **{**kwargs, "use_cpu": True} if ours else kwargs)
        self._gpupool_kernels = []
        if ours and getattr(self, "use_device", None):
            self.profiler_kind = profiler_state.KINETO
            self.kineto_activities = {torch.profiler.ProfilerActivity.CPU}

    def _start_trace(self: Any) -> None:
        if self.use_device in _KINDS:
            _trace(True)
        start(self)

    def __exit__(self: Any, *args: Any) -> Any:
        if self.enabled and self.use_device in _KINDS:
            self._gpupool_kernels = _trace(False)
        return end(self, *args)

    def _parse_kineto_results(self: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        events = parse(self, result, *args, **kwargs)
        if self.use_device in _KINDS:
            _add_kernels(events, self._gpupool_kernels, result.trace_start_ns() / 1e9, self.use_device)
        return events

    def export_chrome_trace(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        result = export(self, path, *args, **kwargs)
        if self._gpupool_kernels:
            _add_to_trace(path, self._gpupool_kernels)
        return result

    for function in (__init__, _start_trace, __exit__, _parse_kineto_results, export_chrome_trace):
        patches.set(cls, function.__name__, function)
    # NVTX marks operators for a tool that watches a GPU of this machine.
    patches.set(profiler.emit_nvtx, "__enter__", lambda self: self)
    patches.set(profiler.emit_nvtx, "__exit__", lambda self, *args: False)
