"""Durable grants per second through HTTP at 10, 100 and 1,000 servers of 8 GPUs, on SQLite and on PostgreSQL.

The engine starts no workers: each lease becomes ACTIVE at once, which is one more durable change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from jupyter_gpupool.client import discovery

GOALS: dict[str, tuple[str, float]] = {"grants_per_s": (">=", 1000.0)}
HERE = Path(__file__).parent


def run(
    servers: tuple[int, ...] = (10, 100, 1000),
    leases: int = 10_000,
    seconds: float = 5.0,
    connections: int = 64,
) -> dict[str, Any]:
    """``grants_per_s``: grow from no lease to 10,000 live ones. ``grants_and_releases_per_s``: after that, release
    one lease for each that is granted. Times are those of the replies to ``POST leases``."""
    from tests.support.postgresql import PostgreSQL

    results: dict[str, Any] = {"leases": leases, "connections": connections}
    postgresql = PostgreSQL(durable=True)
    try:
        for count in servers:
            for kind in ("sqlite", "postgresql"):
                with tempfile.TemporaryDirectory(prefix="gpupool-bench-") as place:
                    url = f"sqlite:///{place}/ledger.sqlite"
                    if kind == "sqlite":
                        figures = _measure(url, count, leases, seconds, connections)
                    else:
                        with postgresql.database() as url:
                            figures = _measure(url, count, leases, seconds, connections)
                results[f"{count}_servers_{kind}"] = figures
    finally:
        postgresql.remove()
    return results


def _measure(url: str, servers: int, leases: int, seconds: float, connections: int) -> dict[str, Any]:
    program = [sys.executable, str(HERE / "pool_without_workers.py"), f"--db-url={url}", "--port=0"]
    options = ["--PoolService.ttl_s=3600", "--GPUPoolServer.log_level=WARN"]
    environment = {**os.environ, "SERVERS": str(servers), "GPUS": "8"}
    pool = subprocess.Popen([*program, *options], env=environment)
    try:
        address = None
        while address is None or address.pid != pool.pid:
            assert pool.poll() is None, "the pool ended at its start"
            time.sleep(0.05)
            address = discovery.find()
        where = httpx.URL(address.url)
        words = [where.host, where.port, address.token, connections, leases, seconds]
        load = subprocess.run(
            [sys.executable, str(HERE / "lease_load.py"), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert load.returncode == 0, load.stderr
        return json.loads(load.stdout)
    finally:
        pool.terminate()
        pool.wait(60)
