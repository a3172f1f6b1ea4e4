"""A graph whose worker may start no program: its helper compiles it, in an engine whose sandbox is required."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.pytorch.client import session
from jupyter_gpupool.pytorch.client.compile.graphs import states
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from .life import SECRET, SLICE, Report, lease_of

#: How often to look whether the graph is compiled, in seconds.
_INTERVAL_S = 0.2
_ROUNDS = 15


def run(device: DeviceSpec, n: int, patience_s: float, report: Report) -> None:
    """Compile a graph of so many rows in the helper of a worker with that slice, and compare it with its operators."""
    with tempfile.TemporaryDirectory(prefix="gpupool-helper-") as folder:
        asyncio.run(_run(device, n, patience_s, report, folder))


async def _run(device: DeviceSpec, n: int, patience_s: float, report: Report, folder: str) -> None:
    emulate: Any = "always" if device.emulated else "never"
    engine = LocalEngine(run_dir=folder, emulate=emulate, sandbox="require", start_timeout_s=120.0)
    await engine.start(lambda lease_id, state, reason: None)
    line = None
    try:
        lease = lease_of(device)
        try:
            worker = await engine.start_worker(lease)
        except EngineError as e:
            report("state", str(e)[:200])
            report("compiled", 0)
            return
        spec = AttachSpec(lease.id, worker.host, worker.port, SECRET, (device,), lease.ttl_s)
        line = await asyncio.to_thread(Lifeline, spec)
        session.activate(spec)
        await asyncio.to_thread(_compare, n, patience_s, report)
    finally:
        session.deactivate()
        if line is not None:
            await asyncio.to_thread(line.release)
        await engine.stop()


def _layers(x: torch.Tensor) -> torch.Tensor:
    for _ in range(10):
        x = torch.relu(x * 1.01 + 0.1) * 0.5 + x
    return x


def _compare(n: int, patience_s: float, report: Report) -> None:
    x = torch.randn(n, 256, device=SLICE)
    expected = _layers(x.cpu())
    options = {"cudagraphs": False}
    one_by_one = torch.compile(_layers, backend="gpupool", options={**options, "inductor": False})
    fused = torch.compile(_layers, backend="gpupool", options={**options, "inductor": True})
    steps_s = _median_s(lambda: one_by_one(x))
    began = time.perf_counter()
    for _ in range(4):
        fused(x)
    while "compiling" in states() and time.perf_counter() - began < patience_s:
        time.sleep(_INTERVAL_S)
    report("wait_s", time.perf_counter() - began)
    said = [state for state in states() if state]
    report("state", said[0][:200] if said else "")
    report("compiled", int(said == ["compiled"]))
    report("same_digits", int(torch.allclose(fused(x).cpu(), expected, rtol=1e-5, atol=1e-5)))
    report("to_steps", steps_s / _median_s(lambda: fused(x)))


def _median_s(function: Callable[[], torch.Tensor]) -> float:
    found = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        function()[0, 0].item()
        found.append(time.perf_counter() - began)
    return statistics.median(found)
