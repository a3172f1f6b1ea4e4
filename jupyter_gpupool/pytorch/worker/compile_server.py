"""The compile helper: compiles the graphs of one worker, which may start no program, in a process of its own.

It is given definitions and no tensors. It checks a definition as a worker does, has inductor compile it for tensors
that have no memory, and returns the shared object.
"""

from __future__ import annotations

import functools
import signal
import socket
from pathlib import Path
from typing import Any, cast

import torch

from jupyter_gpupool.pytorch.torch_internals.worker import (
    FakeTensorMode,
    aot_compile,
    inductor_settings,
)

from . import compile_messages as messages
from .device import Device
from .graph_module import module_of
from .graph_steps import GraphSteps
from .templates import BadRecord, Geometry, decode_geometry

#: As operators that run one by one draw random numbers; no program that outlives its graph. Of the code around the
#: kernels, which only calls them, a compiler makes in half the time what is fast enough.
_SETTINGS: dict[str, Any] = {
    "fallback_random": True,
    "max_autotune": False,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


class Target:
    """In place of a slice: where a graph will run. It has no memory."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    def kernel(self, op: Any, default: Any) -> Any:
        """As :meth:`Device.kernel`. The worker asks for no graph with an operator that it replaces."""
        return default


class TargetScope:
    """What the numbers in a definition refer to, where there are neither tensors nor generators."""

    def __init__(self, torch_device: torch.device) -> None:
        self.home = cast("Device", Target(torch_device))

    def device(self, index: Any) -> Device:
        return self.home

    def geometry(self, wire: Any) -> Geometry:
        return decode_geometry(wire)

    def generator(self, number: Any) -> torch.Generator:
        raise BadRecord("a graph with a generator")


def serve(sock: socket.socket) -> None:
    """Answer until the worker is gone. A definition that takes too long ends this process."""
    inductor_settings.get().compile_threads = 1  # no processes that would outlive a graph
    try:
        while True:
            asked = messages.receive(sock, messages.MAX_DEFINITION_BYTES)
            signal.alarm(messages.TIME_LIMIT_S)
            messages.send(sock, _answer(asked))
            signal.alarm(0)
    except (messages.BadMessage, OSError):
        pass  # the worker has ended, or says what no worker says


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        files = compiled(*messages.question(asked))
        if sum(map(len, files.values())) > messages.MAX_PRODUCT_BYTES >> 1:
            raise ValueError("the compiled graph is too large")
    except messages.BadMessage:
        raise
    except Exception as e:  # no compiler here, or one that does not support the graph
        return {"failed": messages.reason(f"{type(e).__name__}: {e}")}
    return {"files": files}


def compiled(definition: Any, device: str, threads: int) -> dict[str, bytes]:
    """Compile a graph for a device, and return the files by their names; LIBRARY is the shared object.

    ``threads``: how many an operator may use. Raises BadRecord for an invalid definition, and whatever a compiler does.
    """
    graph = GraphSteps(TargetScope(torch.device(device)), definition)
    module = module_of(graph)
    with FakeTensorMode.get()():
        examples = [_example(geom, device) for geom in graph.inputs]
    settings = {name: value for name, value in _SETTINGS.items() if _is_setting(name)}
    with torch.no_grad():
        library = Path(
            aot_compile.get()(module, tuple(examples), options={**settings, "cpp.threads": threads})
        )
    found = {messages.LIBRARY: library.read_bytes()}
    beside = library.with_suffix(".json")  # of the operators that it calls and has no code of
    if beside.is_file():
        found[Path(messages.LIBRARY).with_suffix(".json").name] = beside.read_bytes()
    if device != "cpu":
        kernels = [file for file in library.parent.iterdir() if file.suffix in (".cubin", ".hsaco")]
        found.update((file.name, file.read_bytes()) for file in kernels if messages.is_name(file.name))
    return found


def _example(geom: Geometry, device: str) -> torch.Tensor:
    """A tensor of that layout, at the same distance from the start of its memory."""
    size, stride, offset, dtype, _ = geom
    n = offset + sum((s - 1) * t for s, t in zip(size, stride)) + 1 if 0 not in size else 0
    return torch.empty(n, dtype=dtype, device=device).as_strided(size, stride, offset if n else 0)


def _is_setting(name: str) -> bool:
    """Whether this release has it."""
    try:
        functools.reduce(getattr, name.split("."), inductor_settings.get())
    except AttributeError:
        return False
    return True
