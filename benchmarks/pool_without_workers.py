"""A real pool server whose engine starts no workers, for tests and measurements of granting.

Usage: as `python -m jupyter_gpupool.server.daemon.pool_app`; SERVERS and GPUS in the environment: how many, of how many GPUs each.
"""  # noqa: E501

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jupyter_gpupool.core.models import Lease, Server, WorkerAddress, WorkerUsage
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.server.daemon.pool_app import GPUPoolServer
from jupyter_gpupool.server.service import service


def farm(servers: int, gpus: int) -> list[Server]:
    names = [f"server-{n}" for n in range(servers)]
    return [Server(name, "127.0.0.1", emulated_gpus(name, count=gpus)) for name in names]


class NoWorkers:
    """Every worker is ready at once, outlives its pool, and stops on request."""

    persistent = True
    listens_on = 0
    warm = True
    failure = ""

    def __init__(self, parent: Any, pool_id: str) -> None:
        pass

    async def start(self, *_: Any) -> None:
        pass

    async def servers(self) -> Sequence[Server]:
        return farm(int(os.environ.get("SERVERS", 2)), int(os.environ.get("GPUS", 4)))

    async def start_worker(self, lease: Lease) -> WorkerAddress:
        return WorkerAddress("127.0.0.1", 1, 1, 0.0)

    async def stop_worker(self, lease_id: str) -> None:
        pass

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        pass

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        return {lease.id: lease.worker for lease in leases if lease.worker is not None}

    def readings(self) -> list[Any]:
        return []

    def usage(self) -> dict[str, WorkerUsage]:
        return {}

    async def stop(self) -> None:
        pass


if __name__ == "__main__":
    service.ENGINES["local"] = f"{__name__}.NoWorkers"
    GPUPoolServer.launch_instance()
