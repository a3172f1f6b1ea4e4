"""The worker's own cost of an operator: decoding, dispatch and accounting, beside the operator itself."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.commands import ALLOCATE, DEFINE, FREE
from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice
from jupyter_gpupool.pytorch.worker.executor import WorkerSession
from jupyter_gpupool.transport.specs import DeviceSpec

GOALS = {"add_own_us": ("<=", 6.0), "mul__own_us": ("<=", 6.0)}

OPERATORS = 100
ROUNDS = 300

_LAYOUT = [[4, 4], [4, 1], 0, "float32", 0]
_ADD = {
    "op": "aten::add.Tensor",
    "args": [["t", 0, _LAYOUT], ["t", 1, _LAYOUT]],
    "kwargs": {},
    "tensors": 2,
    "scalars": 0,
    "results": _LAYOUT,
}
_MUL = {
    "op": "aten::mul_.Scalar",
    "args": [["t", 0, _LAYOUT], ["s", 0]],
    "kwargs": {},
    "tensors": 1,
    "scalars": 1,
    "results": None,
}


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return _figures()
    finally:
        torch.set_num_threads(threads)


def _figures() -> dict[str, Any]:
    device = EmulatedDevice(DeviceSpec(0, "GPU-0", "emulated", 1000, 1000, True))
    session = WorkerSession([device], answer=lambda header, copy: None, complain=_fail)
    session.run([ALLOCATE, 1, 64, 0, DEFINE, 0, _ADD, DEFINE, 1, _MUL])
    x, ids = torch.ones(4, 4), itertools.count(2)

    def adds() -> list[Any]:
        new = itertools.islice(ids, OPERATORS)
        return [field for id in new for field in (0, 1, 1, id, FREE, id)]

    def add() -> None:
        for _ in range(OPERATORS):
            x + x

    def mul() -> None:
        for _ in range(OPERATORS):
            x.mul_(1.0)

    pairs = {
        "add": (lambda: (session.run, adds()), lambda: (lambda _: add(), None)),
        "mul_": (lambda: (session.run, [1, 1, 1.0] * OPERATORS), lambda: (lambda _: mul(), None)),
    }
    figures: dict[str, Any] = {}
    for name, (worker, native) in pairs.items():
        here, there = _in_pairs(worker, native)
        figures[f"{name}_us"], figures[f"{name}_native_us"] = round(here, 2), round(there, 2)
        figures[f"{name}_own_us"] = round(here - there, 2)
    return figures


def _in_pairs(*prepare: Callable[[], tuple[Callable[[Any], None], Any]]) -> list[float]:
    """µs per operator of each, which take turns: medians."""
    times: list[list[float]] = [[] for _ in prepare]
    for _ in range(ROUNDS):
        for prepared, spent in zip(prepare, times):
            function, argument = prepared()
            began = time.perf_counter()
            function(argument)
            spent.append((time.perf_counter() - began) / OPERATORS * 1e6)
    return [statistics.median(spent) for spent in times]


def _fail(report: dict[str, Any]) -> None:
    raise RuntimeError(report["message"])
