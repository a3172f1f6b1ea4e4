"""What a worker's sandbox costs: at its start, and for each operator and each call of the kernel."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jupyter_gpupool.engines.local.sandbox import sandbox

GOALS = {"start_ms": ("<=", 5.0)}

FORKS = 30
ROUNDS = 15
OPERATORS = 2000


def run() -> dict[str, Any]:
    """Measure in forks, as workers are; those with and without a sandbox take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try:
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder)
            inside, outside = sandbox.prepare("auto", own), sandbox.prepare("off", own)
            starts = [_in_fork(lambda: _start_ms(inside, own)) for _ in range(FORKS)]
            costs: dict[str, list[dict[str, float]]] = {"inside": [], "outside": []}
            for _ in range(ROUNDS):
                for name, one in (("inside", inside), ("outside", outside)):
                    costs[name].append(_in_fork(lambda: _costs_us(one, own)))  # noqa: B023  called at once
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = {"start_ms": round(statistics.median(starts), 2)}
    for name, measured in costs.items():
        for what in measured[0]:
            found[f"{what}_{name}_us"] = round(statistics.median(one[what] for one in measured), 3)
    return {**found, "off": {layer: why for layer, why in inside.missing(real=False).items() if why}}


def _start_ms(one: sandbox.Sandbox, own: Path) -> float:
    began = time.perf_counter()
    one.enter(own, real=False)
    return (time.perf_counter() - began) * 1000


def _costs_us(one: sandbox.Sandbox, own: Path) -> dict[str, float]:
    one.enter(own, real=False)
    x, (reader, writer) = torch.ones(16), os.pipe()

    def pass_a_byte() -> None:
        os.write(writer, b"x")
        os.read(reader, 1)

    return {"operator": _each_us(lambda: x.add_(1.0)), "two_calls": _each_us(pass_a_byte)}


def _each_us(work: Callable[[], object]) -> float:
    work()
    began = time.perf_counter()
    for _ in range(OPERATORS):
        work()
    return (time.perf_counter() - began) / OPERATORS * 1e6


def _in_fork(measure: Callable[[], Any]) -> Any:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(measure()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        found = json.loads(answer.read())
    os.waitpid(pid, 0)
    return found
