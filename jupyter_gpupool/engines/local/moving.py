"""This server's part in moving a lease from a worker of one server to a worker of another.

The engine of the whole farm decides. :meth:`Moving.send` leaves the lease at rest and whole at both servers; nobody
executes anything until that engine calls :meth:`Moving.serve` there and :meth:`Moving.leave` here, or
:meth:`Moving.stay` here. So a lease is never at two servers, whatever dies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import WorkerAddress

from .linking import connected
from .parking import Parking
from .workers import LocalWorkers

#: How long a worker that was left may take to say so to its clients and to end, in seconds.
_END_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Sent:
    """What a worker has sent: its bytes, the seconds for which its sessions have rested so far, and how many bytes were
    sent before that."""

    nbytes: int
    rest_s: float
    ahead: int = 0


class Moving:
    """``certified``: the workers of the farm speak TLS. ``on_arrived`` is called for a lease that goes on here."""

    def __init__(
        self,
        parking: Parking,
        workers: LocalWorkers,
        certified: bool,
        on_arrived: Callable[[str], None] = lambda lease_id: None,
    ) -> None:
        self._on_arrived = on_arrived
        self._parking = parking
        self._workers = workers
        self._certified = certified

    async def send(self, lease_id: str, to: WorkerAddress) -> Sent:
        """Let a worker send its lease to another one. Raises EngineError; then the lease goes on here."""
        answer = await self._connected("send", lease_id, to)
        return Sent(int(answer["bytes"]), float(answer["rest_s"]), int(answer.get("ahead", 0)))

    async def send_ahead(self, lease_id: str, to: WorkerAddress) -> None:
        """Let a worker send what it can while its lease goes on; ``send_rest`` is to follow. Raises EngineError."""
        await self._connected("send_ahead", lease_id, to)

    async def _connected(self, what: str, lease_id: str, to: WorkerAddress) -> dict[str, Any]:
        # A worker in its sandbox makes no connection.
        with contextlib.closing(await connected(to)) as sock:
            return await self._ask(
                lease_id, what, [sock.fileno()], to=[to.host, to.port], secure=self._certified
            )

    async def stay(self, lease_id: str) -> None:
        """Let a lease that was sent go on here after all. Raises EngineError."""
        await self._ask(lease_id, "stay")

    async def serve(self, lease_id: str) -> None:
        """Let a lease that has arrived go on here. Raises EngineError if it has not arrived whole."""
        await self._ask(lease_id, "serve")
        self._on_arrived(lease_id)

    async def leave(self, lease_id: str, to: WorkerAddress) -> None:
        """End the worker of a lease that goes on elsewhere; its clients are shown the way. Returns when it is gone."""
        gone = self._workers.gone(lease_id)
        if gone is None:
            return
        self._workers.leaving.add(lease_id)
        try:
            await self._ask(lease_id, "leave", to=[to.host, to.port])
            await asyncio.wait_for(gone.wait(), _END_TIMEOUT_S)
        except (EngineError, TimeoutError, asyncio.TimeoutError):
            await self._workers.stop(lease_id)  # its clients ask the pool where the lease is
        finally:
            self._workers.leaving.discard(lease_id)

    async def _ask(
        self, lease_id: str, what: str, descriptors: Sequence[int] = (), **fields: Any
    ) -> dict[str, Any]:
        if self._workers.gone(lease_id) is None:
            raise EngineError(f"lease {lease_id} has no worker here")
        return await self._parking.channel(lease_id).ask(what, descriptors, **fields)
