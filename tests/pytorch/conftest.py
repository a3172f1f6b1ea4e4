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

from jupyter_gpupool.engines.local import worker_files
from jupyter_gpupool.transport import control
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec

from ..support.certificates import Certificates
from ..support.linking_engines import LinkingEngines

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

NAME = "Tesla V100-PCIE-32GB (emulated)"
SECRET = "a secret that only this test knows"

# Workers fork from a process that has imported PyTorch already, as those of a pool do.
_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(["jupyter_gpupool.pytorch.worker.worker"])


def _serve(
    listener: socket.socket, spec: WorkerSpec, own: Path, asked_at: socket.socket | None = None
) -> None:
    """In the sandbox that an engine would give it. ``own``: its directory; ``asked_at``: where that asks it."""
    from jupyter_gpupool.engines.local.sandbox import surroundings
    from jupyter_gpupool.engines.local.sandbox.sandbox import prepare
    from jupyter_gpupool.pytorch.worker import worker

    sandbox = prepare("auto", own)

    def shut_in() -> None:
        surroundings.prepare(own, listener, sandbox.missing(False), not sandbox.refuses_programs(False))
        sandbox.enter(own, real=False)

    os._exit(worker.serve(spec, listener, lambda usage: None, asked_at=asked_at, shut_in=shut_in))


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
        **fields: float | str,
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


@dataclasses.dataclass
class Linked:
    """The workers of one lease on several GPU servers, and what a client needs to reach them."""

    workers: list[Running]
    spec: AttachSpec


@pytest.fixture
def linked(start_worker: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts a lease with so many slices on each of several servers, which speak TLS and link its workers.

    ``ways``: the address by which others reach each worker, where it is another one than its own.
    """
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    with contextlib.ExitStack() as closing:

        def start(*slices: int, ways: dict[int, Callable[[int], int]] | None = None) -> Linked:
            engines = closing.enter_context(LinkingEngines())
            folders, workers = [], []
            for k, count in enumerate(slices):
                folder = tmp_path_factory.mktemp("worker")
                asked_at = control.listen(str(folder), "lease-of-a-test" + worker_files.CONTROL)
                first = sum(slices[:k])
                running = start_worker(
                    count,
                    first=first,
                    serve=functools.partial(_serve, own=folder, asked_at=asked_at),
                    certfile=str(certificates.certfile),
                    keyfile=str(certificates.keyfile),
                )
                asked_at.close()
                running.spec = dataclasses.replace(running.spec, secure=True)
                folders.append(folder)
                workers.append(running)
            specs = [worker.spec for worker in workers]
            reached = {
                one.devices[0].uuid: (one.host, ways[k](one.port) if ways and k in ways else one.port)
                for k, one in enumerate(specs)
            }
            for folder, one in zip(folders, specs):
                others = {name: to for name, to in reached.items() if name != one.devices[0].uuid}
                engines.introduce(folder, one, others)
            devices = tuple(device for one in specs for device in one.devices)
            addresses = tuple((one.host, one.port) for one in specs for _ in one.devices)
            return Linked(workers, dataclasses.replace(specs[0], devices=devices, addresses=addresses))

        yield start


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
