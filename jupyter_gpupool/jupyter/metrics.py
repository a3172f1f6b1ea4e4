"""The pool's gauges among those that Jupyter Server shows at ``/metrics``."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Protocol

from prometheus_client import Gauge

from ..pool.errors import PoolError
from ..pool.models import MIB, Lease, LeaseState

#: How old a figure may get where nothing changes but what is used, in seconds.
_EVERY_S = 5.0

# In the registry that Jupyter Server shows; made once for a process, whatever number of pools it sees.
_UP = Gauge("gpupool_up", "1 while the GPU pool answers, else 0")
_LABELS = ("server", "gpu", "name", "emulated")
_MEMORY = Gauge("gpupool_gpu_memory_bytes", "Memory of a GPU that the pool may grant", _LABELS)
_GRANTED = Gauge("gpupool_gpu_granted_bytes", "Memory of a GPU that leases hold", _LABELS)
_USED = Gauge("gpupool_gpu_used_bytes", "Memory of a GPU that leases have allocated", _LABELS)
_BUSY = Gauge("gpupool_gpu_busy_ratio", "Share of the time that a GPU was computing for leases", _LABELS)
_LEASES = Gauge("gpupool_leases", "Leases that have not ended", ("state",))
_PER_GPU = (
    (_MEMORY, "memory_mib", MIB),
    (_GRANTED, "granted_mib", MIB),
    (_USED, "used_mib", MIB),
    (_BUSY, "busy", 1),
)
_LIVE = [state.value for state in LeaseState if not state.ended]


class _Pool(Protocol):
    async def pool(self, owner: str | None) -> dict[str, Any]: ...

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]: ...


class PoolMetrics:
    """Keeps the gauges up to date until :meth:`stop`; :meth:`changed` says that something did."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._news = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    def changed(self, change: dict[str, Any]) -> None:
        self._news.set()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        _UP.set(0)

    async def _run(self) -> None:
        while True:
            self._news.clear()
            try:
                show(await self._pool.pool(None), await self._pool.leases(None))
                _UP.set(1)
            except PoolError:
                _UP.set(0)
            try:
                await asyncio.wait_for(self._news.wait(), _EVERY_S)
            except (TimeoutError, asyncio.TimeoutError):
                pass


def show(pool: dict[str, Any], leases: list[Lease]) -> None:
    """Set every gauge to what the pool says; GPUs that left it are forgotten."""
    for gauge, _, _ in _PER_GPU:
        gauge.clear()
    for server in pool["servers"]:
        for gpu in server["gpus"]:
            labels = (server["name"], str(gpu["index"]), gpu["name"], str(gpu["emulated"]).lower())
            for gauge, field, unit in _PER_GPU:
                gauge.labels(*labels).set(gpu[field] * unit)
    counted = Counter(lease.state.value for lease in leases)
    for state in _LIVE:
        _LEASES.labels(state).set(counted[state])
