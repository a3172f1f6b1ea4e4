"""Notifies listeners of changes in a pool that another process hosts, by polling that pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Lease

#: How often the pool is polled, in seconds. A lease that begins and ends in between is not noticed.
_POLL_INTERVAL_S = 1.0
#: The maximum share of the time spent polling, because a large pool's answer is work for both sides.
_MAX_POLL_SHARE = 0.05


class _Leases(Protocol):
    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]: ...

    async def wait(self, lease_id: str, owner: str | None, wait_s: float) -> Lease: ...


class LeasePoller:
    """Calls ``callback`` for every change of a visible lease's state, until :meth:`stop`."""

    def __init__(self, pool: _Leases, callback: Callable[[dict[str, Any]], None]) -> None:
        self._pool = pool
        self._callback = callback
        #: set when the leases that exist at the start are known; every change after that is called back for
        self.begun = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    def stop(self) -> None:
        """Stop polling."""
        self._task.cancel()

    async def _run(self) -> None:
        known: dict[str, str] | None = None  # leases that exist at the start are no change
        while True:
            began = time.monotonic()
            try:
                live = {lease.id: lease for lease in await self._pool.leases(None)}
                if known is not None:
                    for id in known.keys() - live.keys():
                        self._notify(await self._pool.wait(id, None, 0), known[id])
                    for id, lease in live.items():
                        if known.get(id) != lease.state.value:
                            self._notify(lease, known.get(id))
                known = {id: lease.state.value for id, lease in live.items()}
                self.begun.set()
            except PoolError:
                pass  # the pool does not answer; the next call of a user finds or starts another
            await asyncio.sleep(max(_POLL_INTERVAL_S, (time.monotonic() - began) / _MAX_POLL_SHARE))

    def _notify(self, lease: Lease, previous: str | None) -> None:
        self._callback({"type": "lease", "lease": lease.to_json(), "previous": previous})
