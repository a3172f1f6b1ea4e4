"""A pool of 1,000 GPUs and 4,000 idle leases: a real service with its ledger, but without workers."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import insert, update
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from jupyter_gpupool.core.models import GPU, Lease, Server, WorkerAddress, WorkerUsage
from jupyter_gpupool.core.readings import ServerReading
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.ledger.tables import gpus, leases, slices
from jupyter_gpupool.server.access.authentication import TokenStore
from jupyter_gpupool.server.http.console import console_handlers
from jupyter_gpupool.server.http.handlers import standalone_application
from jupyter_gpupool.server.service.service import PoolService

SERVERS, GPUS_EACH, LEASES_EACH, MEMORY_MIB, SLICE_MIB = 125, 8, 4, 81920, 20480


class NoWorkers:
    """An engine whose workers do nothing, so that only the pool and its watchers are measured."""

    persistent = True
    certfile = ""
    warm = True
    failure = ""
    listens_on = 0

    def __init__(self) -> None:
        self._servers = [
            Server(f"node{n:03}", f"node{n:03}", tuple(_gpu(n, index) for index in range(GPUS_EACH)))
            for n in range(SERVERS)
        ]
        self._worker = WorkerAddress("localhost", 1, 1, 0.0)

    async def start(self, on_exit: Any, on_servers: Any = None) -> None:
        pass

    async def servers(self) -> Sequence[Server]:
        return self._servers

    async def start_worker(self, lease: Lease) -> WorkerAddress:
        return self._worker

    async def stop_worker(self, lease_id: str) -> None:
        pass

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        pass

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        return {lease.id: self._worker for lease in leases}

    def usage(self) -> dict[str, WorkerUsage]:
        return {}

    def readings(self) -> Sequence[ServerReading]:
        return ()

    async def stop(self) -> None:
        pass


def _gpu(n: int, index: int) -> GPU:
    return GPU(f"GPU-{n:04}-{index}", f"node{n:03}", index, "H100 (emulated)", MEMORY_MIB, emulated=True)


def fill(url: str, servers: Sequence[Server]) -> None:
    """Write a ledger in which every GPU is fully granted."""
    now = time.time()
    ledger = Ledger(url)
    held, pieces = [], []
    for n, (server, gpu) in enumerate((s, g) for s in servers for g in s.gpus):
        for k in range(LEASES_EACH):
            seq = n * LEASES_EACH + k + 1
            held.append(
                dict(
                    seq=seq,
                    id=str(uuid.UUID(int=seq)),
                    owner=f"user{seq % 300}",
                    namespace="default",
                    num_gpus=1,
                    memory_mib=SLICE_MIB,
                    filters="{}",
                    wait=True,
                    secret_sha256="0" * 64,
                    label=f"notebook-{seq}.ipynb",
                    client="benchmark",
                    state="ACTIVE",
                    reason="",
                    created_at=now - seq,
                    granted_at=now - seq,
                    ttl_s=86400.0,
                    **{f"worker_{k}": v for k, v in asdict(WorkerAddress("localhost", 1, 1, 0.0)).items()},
                )
            )
            pieces.append(
                {
                    "lease": seq,
                    "gpu_uuid": gpu.uuid,
                    "server": server.name,
                    "gpu_index": gpu.index,
                    "gpu_name": gpu.name,
                    "memory_mib": SLICE_MIB,
                    "total_mib": MEMORY_MIB,
                    "emulated": True,
                }
            )
    known = [
        {"uuid": g.uuid, "server": s.name, "memory_mib": g.memory_mib, "used_mib": 0}
        for s in servers
        for g in s.gpus
    ]
    with ledger.transaction() as tx:
        tx.execute(insert(gpus), known)
        tx.execute(insert(leases), held)
        tx.execute(insert(slices), pieces)
        tx.execute(update(gpus).values(used_mib=LEASES_EACH * SLICE_MIB))
    ledger.close()


async def serve(folder: Path) -> None:
    """Serve until terminated; print the address as JSON."""
    url = f"sqlite:///{folder / 'ledger.sqlite'}"
    engine = NoWorkers()
    fill(url, await engine.servers())
    service = PoolService(db_url=url, ttl_s=86400.0, engine=engine)
    await service.start()
    application = standalone_application(service, TokenStore("benchmark"), log_function=lambda handler: None)
    application.add_handlers(".*", console_handlers())
    sockets = bind_sockets(0, "127.0.0.1")
    HTTPServer(application).add_sockets(sockets)
    print(json.dumps({"url": f"http://127.0.0.1:{sockets[0].getsockname()[1]}"}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
