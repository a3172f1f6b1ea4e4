"""Leases granted and released per second by one manager, without HTTP and workers."""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.models import Request, Server, WorkerAddress
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager

SHARE = 0.1


def run(seconds: float = 3.0, folder: str | None = None) -> dict[str, Any]:
    """Request, start and release leases one after the other for that long. Return figures for JSON.

    A grant is three durable changes (granted, active, released). ``queue`` repeats it with requests
    waiting, which every change then has to look at. ``commit_us`` is what the disk under ``folder``
    asks for one durable commit, whatever the pool does.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpupool-bench-") as place:
        idle = _cycles(Path(place) / "idle.sqlite", seconds, waiting=0)
        busy = _cycles(Path(place) / "busy.sqlite", seconds / 2, waiting=50)
        return {
            "benchmark": "manager_grants",
            "grants_per_s": idle["per_s"],
            "request_us_p50": idle["request_us_p50"],
            "request_us_p99": idle["request_us_p99"],
            "queue": {"waiting": 50, "grants_per_s": busy["per_s"]},
            "commit_us": _commit_us(Path(place) / "raw.sqlite"),
            "cpus": os.cpu_count(),
        }


def _cycles(path: Path, seconds: float, waiting: int) -> dict[str, float]:
    ledger = Ledger(f"sqlite:///{path}")
    try:
        manager = Manager(ledger, ttl_s=3600.0)
        manager.set_servers([Server("bench", "127.0.0.1", emulated_gpus("bench"))])
        if waiting:  # one GPU is taken, and the queue waits for that one
            manager.request(_request(1.0, {"index": "1"}, "others"))
        for _ in range(waiting):
            manager.request(_request(1.0, {"index": "1"}, "others"))
        done, took = 0, []
        begun = time.perf_counter()
        while (now := time.perf_counter()) - begun < seconds:
            change = manager.request(_request(SHARE, {"index": "0"}))
            took.append(time.perf_counter() - now)
            assert change.lease is not None and change.lease.slices
            manager.worker_started(change.lease.id, WorkerAddress("127.0.0.1", 1, os.getpid(), 0.0))
            manager.release(change.lease.id)
            done += 1
        elapsed = time.perf_counter() - begun
    finally:
        ledger.close()
    hundredths = statistics.quantiles(took, n=100)
    return {
        "per_s": round(done / elapsed, 1),
        "request_us_p50": round(hundredths[49] * 1e6, 1),
        "request_us_p99": round(hundredths[98] * 1e6, 1),
    }


def _request(share: float, filters: dict[str, str], namespace: str = "default") -> Request:
    return Request(
        id=str(uuid.uuid4()),
        owner="bench",
        partial=share,
        filters=filters,
        namespace=namespace,
        secret_sha256="0" * 64,
    )


def _commit_us(path: Path, times: int = 200) -> float:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE t (a INTEGER)")
        begun = time.perf_counter()
        for number in range(times):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t VALUES (?)", (number,))
            connection.execute("COMMIT")
        return round((time.perf_counter() - begun) / times * 1e6, 1)
    finally:
        connection.close()


if __name__ == "__main__":
    print(json.dumps(run(float(sys.argv[1]) if len(sys.argv) > 1 else 3.0), indent=2))
