"""How the steps of `make gpu` measure: where they run, a worker of their own, and a figure beside the native one's."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from jupyter_gpupool.gpus.nvml import nvml_gpus
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec

MIB = 1 << 20
REMOTE = "gpupool:0"
_SECRET = "of one benchmark"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how large: on a GPU, or in a rehearsal."""

    rehearse: bool

    @property
    def native(self) -> str:
        return "cpu" if self.rehearse else "cuda:0"

    def size(self, real: int, rehearsed: int) -> int:
        return rehearsed if self.rehearse else real

    def wait(self, device: str) -> None:
        """Wait until everything on a device has run."""
        if device == REMOTE:
            torch.gpupool.synchronize()  # type: ignore[attr-defined]
        elif device != "cpu":
            torch.cuda.synchronize()

    def device(self, share: float = 1.0) -> DeviceSpec:
        """A slice with that share of the first GPU's memory."""
        if self.rehearse:
            return DeviceSpec(0, "GPU-emulated", "emulated", int(4096 * share), 4096, True)
        gpu = nvml_gpus("localhost")[0]
        return DeviceSpec(0, gpu.uuid, gpu.name, int(gpu.memory_mib * share), gpu.memory_mib, False)


def figure(name: str, value: Any) -> None:
    """Report one figure."""
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    print(json.dumps({"figure": name, "value": value}), flush=True)


def _serve(listener: socket.socket, spec: WorkerSpec, ready: Any) -> None:
    from jupyter_gpupool.pytorch.worker import worker

    ready.set()
    os._exit(worker.serve(spec, listener, lambda usage: None))


@contextlib.contextmanager
def started(device: DeviceSpec, certificate: Any = None) -> Iterator[tuple[AttachSpec, int]]:
    """A worker with one slice: how to reach it, and its process id."""
    spec = WorkerSpec(
        "benchmark", hashlib.sha256(_SECRET.encode()).hexdigest(), (device,), attach_timeout_s=120.0
    )
    if certificate:
        spec = dataclasses.replace(spec, certfile=certificate.certfile, keyfile=certificate.keyfile)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        port = listener.getsockname()[1]
        ready = multiprocessing.get_context("spawn").Event()
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(listener, spec, ready), daemon=True
        )
        process.start()
        while not ready.wait(1.0):  # it imports PyTorch first
            if not process.is_alive():
                raise SystemExit(f"the worker ended with exit code {process.exitcode} before it was ready")
    near = AttachSpec(spec.lease_id, "127.0.0.1", port, _SECRET, (device,), spec.ttl_s)
    if certificate:
        near = dataclasses.replace(near, secure=True)
    try:
        yield near, process.pid or 0
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def attached(setting: Setting, share: float = 0.5, certificate: Any = None) -> Iterator[AttachSpec]:
    """A worker with one slice, attached to this process as ``gpupool:0``."""
    from jupyter_gpupool.pytorch.client import session

    with started(setting.device(share), certificate) as (near, _):
        session.activate(near)
        try:
            yield near
        finally:
            session.deactivate()


@contextlib.contextmanager
def by_tls(setting: Setting) -> Iterator[None]:
    """As :func:`attached`, with TLS as a secured pool has it."""
    from benchmarks.far_worker import certificate

    with certificate() as secured, attached(setting, certificate=secured):
        yield


def seconds(setting: Setting, device: str, function: Callable[[], Any], times: int) -> float:
    """Seconds of one call, in a row of ``times`` without a wait between them."""
    setting.wait(device)
    began = time.perf_counter()
    for _ in range(times):
        function()
    setting.wait(device)
    return (time.perf_counter() - began) / times


def beside(
    setting: Setting, native: Callable[[], Any], remote: Callable[[], Any], times: int, rounds: int
) -> tuple[float, float, float]:
    """(native s, remote s, native ÷ remote): medians of alternating rounds after one that warms up.

    A ratio of 1 is native speed; less is slower.
    """
    for _ in range(3):
        native(), remote()
    pairs = [
        (seconds(setting, setting.native, native, times), seconds(setting, REMOTE, remote, times))
        for _ in range(rounds + 1)
    ][1:]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def show(name: str, found: tuple[float, float, float]) -> None:
    """Report what :func:`beside` measured."""
    prefix = f"{name}_" if name else ""
    figure(f"{prefix}native_ms", 1e3 * found[0])
    figure(f"{prefix}remote_ms", 1e3 * found[1])
    figure(f"{prefix}remote_to_native", found[2])
