"""Starts a real worker process, without a pool, for each test that needs one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

NAME = "Tesla V100-PCIE-32GB (emulated)"
SECRET = "a secret that only this test knows"

# Workers fork from a process that has imported PyTorch already, as those of a pool do.
_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(["jupyter_gpupool.pytorch.worker.worker"])


def _serve(listener: socket.socket, spec: WorkerSpec, own: Path) -> None:
    """In the sandbox that an engine would give it. ``own``: its directory."""
    from jupyter_gpupool.engines.local.sandbox import surroundings
    from jupyter_gpupool.engines.local.sandbox.sandbox import prepare
    from jupyter_gpupool.pytorch.worker import worker

    sandbox = prepare("auto", own)

    def shut_in() -> None:
        surroundings.prepare(own, listener, sandbox.missing(real=False), real=False)
        sandbox.enter(own, real=False)

    os._exit(worker.serve(spec, listener, lambda usage: None, shut_in=shut_in))


@dataclasses.dataclass
class Running:
    """A worker, and what a client needs to reach it."""

    process: Any
    spec: AttachSpec

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()

    def exit_code(self, timeout: float = 300) -> int:
        self.process.join(timeout)
        return self.process.exitcode


@contextlib.contextmanager
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts workers, which end with the block."""
    started: list[Any] = []

    def start(
        num_gpus: int = 2,
        memory_mib: int = 26008,
        first: int = 0,
        serve: Callable[..., None] | None = None,
        devices: tuple[DeviceSpec, ...] = (),
        **fields: float,
    ) -> Running:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            devices = devices or tuple(
                DeviceSpec(i, f"GPU-{i}", NAME, memory_mib, 32510, True)
                for i in range(first, first + num_gpus)
            )
            digest = hashlib.sha256(SECRET.encode()).hexdigest()
            spec = WorkerSpec("lease-of-a-test", digest, devices, **{"attach_timeout_s": 6000.0, **fields})
            serve = serve or functools.partial(_serve, own=tmp_path_factory.mktemp("worker"))
            process = _warm.Process(target=serve, args=(listener, spec), daemon=True)
            process.start()
            started.append(process)
            port = listener.getsockname()[1]
        return Running(process, AttachSpec(spec.lease_id, "127.0.0.1", port, SECRET, devices, spec.ttl_s))

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.join()


@pytest.fixture
def start_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    with workers(tmp_path_factory) as start:
        yield start


@pytest.fixture
def worker(start_worker: Callable[..., Running]) -> Running:
    return start_worker()


@pytest.fixture
def attached(worker: Running) -> Iterator[Running]:
    """A worker with two slices of 26008 MiB, attached to this process."""
    from jupyter_gpupool.pytorch.client import session

    session.activate(worker.spec)
    yield worker
    session.deactivate()


@pytest.fixture
def spread(start_worker: Callable[..., Running]) -> Iterator[tuple[Running, Running]]:
    """A lease of three slices, attached to this process: ``cuda:0`` of one worker, the others of another."""
    from jupyter_gpupool.pytorch.client import session

    workers = start_worker(1), start_worker(2, first=1)
    one, two = (worker.spec for worker in workers)
    addresses = tuple((part.host, part.port) for part in (one, two, two))
    session.activate(dataclasses.replace(one, devices=(*one.devices, *two.devices), addresses=addresses))
    yield workers
    session.deactivate()
