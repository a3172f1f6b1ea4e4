"""The pool's gauges in Jupyter Server's ``/metrics``."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from prometheus_client import REGISTRY

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.server.http.metrics import PoolFigures

#: How often the figures are read if no lease changes, in seconds.
_READ_INTERVAL_S = 5.0
#: The maximum share of the time spent reading, because a large pool is work.
_MAX_READ_SHARE = 0.05

#: In the registry that Jupyter Server shows. Created once a process, which may see several pools.
_FIGURES = PoolFigures(REGISTRY)


class _Pool(Protocol):
    async def pool(self, owner: str | None) -> dict[str, Any]: ...

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]: ...


class PoolMetrics:
    """Keeps the figures up to date until :meth:`stop`. :meth:`changed` is a listener of the pool."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._has_changed = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    def changed(self, change: dict[str, Any]) -> None:
        """Count a change of a lease, and read the figures again."""
        _FIGURES.changed(change)
        self._has_changed.set()

    async def stop(self) -> None:
        """Stop reading, and report the pool as down."""
        self._task.cancel()
        await asyncio.wait([self._task])
        _FIGURES.up.set(0)

    async def _run(self) -> None:
        while True:
            self._has_changed.clear()
            began = time.monotonic()
            try:
                _FIGURES.show(await self._pool.pool(None), await self._pool.leases(None))
            except PoolError:
                _FIGURES.up.set(0)
            rest = (time.monotonic() - began) / _MAX_READ_SHARE
            if rest > _READ_INTERVAL_S:
                await asyncio.sleep(rest)
            try:
                await asyncio.wait_for(self._has_changed.wait(), _READ_INTERVAL_S)
            except (TimeoutError, asyncio.TimeoutError):
                pass
