"""A real worker process for each test that asks for one, without a pool above it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from jupyter_gpupool.remote.specs import AttachSpec, DeviceSpec, WorkerSpec

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

NAME = "Tesla V100-PCIE-32GB (emulated)"
SECRET = "a secret that only this test knows"

#: What a worker process runs: serve() on an inherited socket, its reports as lines on stdout.
SERVE = """
import json, os, socket, sys
from jupyter_gpupool.remote import worker
from jupyter_gpupool.remote.specs import WorkerSpec
listener = socket.socket(fileno=int(sys.argv[1]))
spec = WorkerSpec.from_json(json.loads(sys.argv[2]))
os._exit(worker.serve(spec, listener, lambda state: print(json.dumps(state), flush=True)))
"""


@dataclasses.dataclass
class Running:
    process: subprocess.Popen
    spec: AttachSpec

    def exit_code(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)


@pytest.fixture
def start_worker() -> Iterator[Callable[..., Running]]:
    started: list[subprocess.Popen] = []

    def start(num_gpus: int = 2, memory_mib: int = 26008, **fields: float) -> Running:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        devices = tuple(DeviceSpec(i, f"GPU-{i}", NAME, memory_mib, 32510, True) for i in range(num_gpus))
        digest = hashlib.sha256(SECRET.encode()).hexdigest()
        spec = WorkerSpec("lease-of-a-test", digest, devices, **{"attach_timeout_s": 60.0, **fields})
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(listener.fileno()), json.dumps(dataclasses.asdict(spec))],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        port = listener.getsockname()[1]
        listener.close()
        return Running(process, AttachSpec(spec.lease_id, "127.0.0.1", port, SECRET, devices, spec.ttl_s))

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def worker(start_worker: Callable[..., Running]) -> Running:
    return start_worker()


@pytest.fixture
def attached(worker: Running) -> Iterator[Running]:
    """A worker with two slices of 26008 MiB, attached to this process."""
    from jupyter_gpupool.remote import session

    session.activate(worker.spec)
    yield worker
    session.deactivate()
