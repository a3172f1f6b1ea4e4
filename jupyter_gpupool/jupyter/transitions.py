"""What a pool's own listeners are told, found out from outside: for a pool that another process hosts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from ..pool.errors import PoolError
from ..pool.models import Lease

#: How often it is asked, in seconds. What came and went in between is not heard of.
_EVERY_S = 1.0
#: At most this share of the time is spent with asking: the answer of a large pool is work for both sides.
_SHARE = 0.05


class _Leases(Protocol):
    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]: ...

    async def wait(self, lease_id: str, owner: str | None, wait_s: float) -> Lease: ...


class Watch:
    """Tells ``callback`` of every change of a lease's state that can be seen, until :meth:`stop`."""

    def __init__(self, pool: _Leases, callback: Callable[[dict[str, Any]], None]) -> None:
        self._pool = pool
        self._callback = callback
        self._task = asyncio.ensure_future(self._run())

    def stop(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        known: dict[str, str] | None = None  # what is there already is no news
        while True:
            began = time.monotonic()
            try:
                live = {lease.id: lease for lease in await self._pool.leases(None)}
                if known is not None:
                    for id in known.keys() - live.keys():
                        self._tell(await self._pool.wait(id, None, 0), known[id])
                    for id, lease in live.items():
                        if known.get(id) != lease.state.value:
                            self._tell(lease, known.get(id))
                known = {id: lease.state.value for id, lease in live.items()}
            except PoolError:
                pass  # away; whoever calls it next will see to that
            await asyncio.sleep(max(_EVERY_S, (time.monotonic() - began) / _SHARE))

    def _tell(self, lease: Lease, previous: str | None) -> None:
        self._callback({"type": "lease", "lease": lease.to_json(), "previous": previous})
