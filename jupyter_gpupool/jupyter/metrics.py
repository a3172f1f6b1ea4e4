"""The pool's gauges among those that Jupyter Server shows at ``/metrics``."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from prometheus_client import REGISTRY

from ..api.metrics import PoolFigures
from ..pool.errors import PoolError
from ..pool.models import Lease

#: How old a figure may get where nothing changes but what is used, in seconds.
_EVERY_S = 5.0
#: At most this share of the time is spent with reading: a large pool is work.
_SHARE = 0.05

#: In the registry that Jupyter Server shows; made once for a process, whatever number of pools it sees.
_FIGURES = PoolFigures(REGISTRY)


class _Pool(Protocol):
    async def pool(self, owner: str | None) -> dict[str, Any]: ...

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]: ...


class PoolMetrics:
    """Keeps the figures up to date until :meth:`stop`; :meth:`changed` says that something did."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._news = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    def changed(self, change: dict[str, Any]) -> None:
        _FIGURES.changed(change)
        self._news.set()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        _FIGURES.up.set(0)

    async def _run(self) -> None:
        while True:
            self._news.clear()
            began = time.monotonic()
            try:
                _FIGURES.show(await self._pool.pool(None), await self._pool.leases(None))
            except PoolError:
                _FIGURES.up.set(0)
            rest = (time.monotonic() - began) / _SHARE
            if rest > _EVERY_S:
                await asyncio.sleep(rest)
            try:
                await asyncio.wait_for(self._news.wait(), _EVERY_S)
            except (TimeoutError, asyncio.TimeoutError):
                pass
