"""Leases granted and released per second over HTTP, with and without their workers."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from typing import Any

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.models import LeaseState, Request

from .first_result import _wait_until_warm

GOALS: dict[str, tuple[str, float]] = {}


def run(seconds: float = 4.0) -> dict[str, Any]:
    """``grants_per_s``: request, grant and release, while workers start and stop in the background.
    ``ready_per_s``: the same, with a wait until each lease's worker is ready."""
    _wait_until_warm()
    address = discovery.find_or_start()
    return {
        "grants_per_s": _rate(address, seconds, wait_s=0.0, clients=1),
        "ready_per_s": _rate(address, seconds, wait_s=10.0, clients=1),
        "ready_per_s_4_clients": _rate(address, seconds, wait_s=10.0, clients=4),
    }


def _rate(address: discovery.PoolAddress, seconds: float, wait_s: float, clients: int) -> float:
    counts = [0] * clients
    end = time.perf_counter() + seconds

    def work(n: int) -> None:
        with PoolClient(address.url, address.token) as client:
            while time.perf_counter() < end:
                digest = hashlib.sha256(b"benchmark").hexdigest()
                request = Request(str(uuid.uuid4()), "", 1, 0.2, secret_sha256=digest)
                lease = client.request(request, wait_s=wait_s)
                assert lease.state in (LeaseState.GRANTED, LeaseState.ACTIVE), lease
                client.release(lease.id)
                counts[n] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
    began = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return round(sum(counts) / (time.perf_counter() - began), 1)
