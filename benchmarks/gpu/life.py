"""What becomes of a lease in an engine: it is resized, parked where that is possible, and its worker is replaced."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.core.errors import EngineError, SliceInUse
from jupyter_gpupool.core.models import Lease, LeaseState, Request, Slice, WorkerAddress
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.pytorch.client import session
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

SECRET = "of one benchmark"
SLICE = "gpupool:0"
_ID = "0c6f6a6e-0000-4000-8000-00000000beef"

Report = Callable[[str, Any], None]


def run(device: DeviceSpec, report: Report) -> None:
    """Take a lease with that slice through its life."""
    with tempfile.TemporaryDirectory(prefix="gpupool-life-") as folder:
        asyncio.run(_run(device, report, folder))


async def _run(device: DeviceSpec, report: Report, folder: str) -> None:
    engine = LocalEngine(
        run_dir=folder, emulate="always" if device.emulated else "never", park_memory_mib=256
    )
    ended: list[str] = []
    replaced: list[WorkerAddress] = []
    await engine.start(lambda lease_id, state, reason: ended.append(reason))
    engine.on_replaced(lambda lease_id, worker, reason: replaced.append(worker))
    line = None
    try:
        lease = lease_of(device)
        worker = await engine.start_worker(lease)
        spec = AttachSpec(lease.id, worker.host, worker.port, SECRET, (device,), lease.ttl_s)
        line = await asyncio.to_thread(Lifeline, spec)
        session.activate(spec)
        kept = await asyncio.to_thread(_resident)
        await _resize(engine, lease, device, report)
        await _park(engine, lease, kept, report)
        del kept
        await asyncio.to_thread(_replace, lambda: os.kill(worker.pid, signal.SIGSEGV), report, "crash")
        if not device.emulated:  # an emulated one raises IndexError, and goes on
            await asyncio.to_thread(_replace, _assert_on_device, report, "assertion")
        report("replaced", len(replaced))
        if ended:
            raise SystemExit(f"the lease has ended: {ended[0]}")
    finally:
        session.deactivate()
        if line is not None:
            await asyncio.to_thread(line.release)
        await engine.stop()


def lease_of(device: DeviceSpec) -> Lease:
    """A lease with that slice, which no pool knows."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    request = Request(_ID, "benchmark", memory_mib=device.limit_mib, secret_sha256=digest)
    piece = Slice(device.uuid, "here", 0, device.name, device.limit_mib, device.total_mib, device.emulated)
    return Lease(request, LeaseState.GRANTED, (piece,))


def _resident() -> torch.Tensor:
    x = torch.arange(1 << 20, dtype=torch.float32, device=SLICE)
    x.sum().item()
    return x


async def _resize(engine: LocalEngine, lease: Lease, device: DeviceSpec, report: Report) -> None:
    smaller, free = device.limit_mib * 3 // 4, torch.gpupool.mem_get_info  # type: ignore[attr-defined]
    began = time.perf_counter()
    await engine.limit_worker(lease.id, {device.uuid: smaller})
    report("resize_ms", 1e3 * (time.perf_counter() - began))
    try:
        await engine.limit_worker(lease.id, {device.uuid: 1})
    except SliceInUse as e:
        report("resize_refused", str(e)[:120])
    else:
        raise SystemExit("a slice was made smaller than what is in use of it")
    await engine.limit_worker(lease.id, {device.uuid: device.limit_mib})
    report("free_mib", (await asyncio.to_thread(free, 0))[0] / (1 << 20))


async def _park(engine: LocalEngine, lease: Lease, kept: torch.Tensor, report: Report) -> None:
    before = await asyncio.to_thread(lambda: kept.sum().item())
    began = time.perf_counter()
    try:
        await engine.park_worker(lease)
    except EngineError as e:
        report("parking", f"refused: {e}"[:120])
        return
    report("park_ms", 1e3 * (time.perf_counter() - began))
    began = time.perf_counter()
    await engine.resume_worker(lease)
    if await asyncio.to_thread(lambda: kept.sum().item()) != before:
        raise SystemExit("a tensor is not what it was before it was parked")
    report("wake_ms", 1e3 * (time.perf_counter() - began))


def _replace(fail: Callable[[], None], report: Report, name: str) -> None:
    """Let the worker fail; measure the time until its successor has computed something."""
    host = torch.arange(8.0)
    began = time.perf_counter()
    fail()
    try:
        while True:  # until the program gets its one exception
            torch.ones(8, device=SLICE).sum().item()
    except RuntimeError as e:
        report(f"{name}_told", str(e).splitlines()[0][:160])
    if (host.to(SLICE) * 2).sum().item() != 56:
        raise SystemExit("the successor computes something else")
    report(f"{name}_replaced_s", time.perf_counter() - began)


def _assert_on_device() -> None:
    table, index = torch.ones(4, 4, device=SLICE), torch.tensor([99], device=SLICE)
    torch.nn.functional.embedding(index, table)  # reported by what waits next
