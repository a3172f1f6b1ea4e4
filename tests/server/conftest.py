"""A real pool in a process of its own, on its own ledger."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.models import Lease, LeaseState, Request
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from ..conftest import PATIENCE_S

pytest.importorskip("torch", reason="workers need PyTorch")

SECRET = "known to the client alone"


def ask(partial: float | None = 0.5, num_gpus: int = 1, **fields: Any) -> Request:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    return Request(str(uuid.uuid4()), "", num_gpus, partial, secret_sha256=digest, **fields)


def attach_spec(lease: Lease) -> AttachSpec:
    assert lease.worker is not None
    devices = tuple(
        DeviceSpec(n, s.gpu_uuid, s.name, s.memory_mib, s.total_mib, s.emulated)
        for n, s in enumerate(lease.slices)
    )
    return AttachSpec(lease.id, lease.worker.host, lease.worker.port, SECRET, devices, lease.ttl_s)


def begun(client: PoolClient, request: Request) -> Lease:
    """The lease as soon as its worker runs, or it has ended."""
    # Asking again is harmless, and who asks counts as alive until the worker is there.
    lease = client.request(request, wait_s=30)
    while lease.state in (LeaseState.QUEUED, LeaseState.GRANTED):
        lease = client.request(request, wait_s=30)
    return lease


@dataclass
class Pool:
    process: subprocess.Popen
    client: PoolClient

    def hold(self, request: Request) -> tuple[Lease, Lifeline]:
        """Request, wait for the worker, and hold it as this process."""
        lease = begun(self.client, request)
        return lease, Lifeline(attach_spec(lease))

    def granted_mib(self) -> list[int]:
        return [gpu["granted_mib"] for server in self.client.pool()["servers"] for gpu in server["gpus"]]


@pytest.fixture
def start_pool(eventually: Callable, tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    started: list[Pool] = []

    def start(*options: str, port: int = 0) -> Pool:
        if not any(option.startswith("--LocalEngine.attach_timeout_s=") for option in options):
            options = ("--LocalEngine.attach_timeout_s=600", *options)  # a busy machine takes its time
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyter_gpupool.server.daemon.pool_app",
                f"--port={port}",
                "--emulate",
                f"--db-url=sqlite:///{tmp_path / 'ledger.sqlite'}",
                *options,
            ]
        )

        def published() -> discovery.PoolAddress | None:
            assert process.poll() is None, "the pool ended at its start"
            address = discovery.find()
            return address if address is not None and address.pid == process.pid else None

        address = eventually(published, "the pool answers")
        pool = Pool(process, PoolClient(address.url, address.token, timeout_s=PATIENCE_S))
        started.append(pool)
        return pool

    yield start
    for pool in started:
        pool.client.close()
        pool.process.terminate()
    for pool in started:
        try:
            pool.process.wait(300)
        except subprocess.TimeoutExpired:
            pool.process.kill()
            pool.process.wait()


@pytest.fixture
def pool(start_pool: Callable[..., Pool]) -> Pool:
    return start_pool()
