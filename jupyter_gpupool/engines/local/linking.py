"""Connects workers of this server to the other workers of their leases, on other servers, when they ask for it.

Workers make no connections. One that was taken over may ask for whatever it likes: it gets a connection to where its
own lease has a worker, one a second, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from logging import LoggerAdapter
from typing import Any

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import WorkerAddress

from .worker_controls import WorkerChannel
from .worker_tasks import WorkerTasks

#: How long another server may take to accept a connection, in seconds.
_CONNECT_TIMEOUT_S = 10.0
#: How long after a connection to a worker the next one to it is made, in seconds.
_PAUSE_S = 1.0


async def connected(to: WorkerAddress) -> socket.socket:
    """A connection to a worker of another server. Raises EngineError."""
    try:
        return await asyncio.to_thread(
            socket.create_connection, (to.host, to.port), timeout=_CONNECT_TIMEOUT_S
        )
    except OSError as e:
        raise EngineError(f"the other worker cannot be reached: {e}") from None


class Linking:
    """``channel``: the connection to a lease's worker. ``certified``: workers speak TLS."""

    def __init__(self, channel: Callable[[str], WorkerChannel], certified: bool, log: Any) -> None:
        self._channel = channel
        self._certified = certified
        self._log: LoggerAdapter[Any] = log
        self._others: dict[str, dict[str, WorkerAddress]] = {}
        #: when a worker was last connected to another one, by the lease and the other's name
        self._connected_at: dict[tuple[str, str], float] = {}
        self._tasks = WorkerTasks(log)

    async def introduce(self, lease_id: str, others: Mapping[str, WorkerAddress]) -> None:
        """Let the worker of a lease be linked to these from now on. Returns when it knows them. Raises EngineError."""
        self._others[lease_id] = dict(others)
        await self.listen(lease_id)

    async def listen(self, lease_id: str) -> None:
        """Hear what a worker asks, which has perhaps just been started again. Raises EngineError."""
        others = self._others.get(lease_id)
        if others is not None:
            await self._channel(lease_id).ask("peers", names=list(others))

    def forget(self, lease_id: str) -> None:
        """The lease's worker has ended for good."""
        self._others.pop(lease_id, None)
        self._connected_at = {key: at for key, at in self._connected_at.items() if key[0] != lease_id}

    def on_asked(self, lease_id: str, peer: str) -> None:
        """A worker asks for a connection to another one."""
        others = self._others.get(lease_id)
        is_known = others is not None and peer in others
        # At most one task for each that is known, and one for all others.
        self._tasks.start(f"{lease_id} {peer if is_known else ''}", lambda _: self._link(lease_id, peer))

    async def stop(self) -> None:
        """Connect nobody any more."""
        await self._tasks.stop()

    async def _link(self, lease_id: str, peer: str) -> None:
        others = self._others.get(lease_id)
        to = others.get(peer) if others is not None else None
        with contextlib.suppress(EngineError):  # it has ended
            if others is None or to is None:
                await self._answer(lease_id, peer, failed="the engine knows of no such worker of the lease")
                return
            now = asyncio.get_running_loop().time()
            await asyncio.sleep(self._connected_at.get((lease_id, peer), now - _PAUSE_S) + _PAUSE_S - now)
            self._connected_at[lease_id, peer] = asyncio.get_running_loop().time()
            try:
                sock = await connected(to)
            except EngineError as e:
                self._log.warning("The workers of lease %s are not linked: %s", lease_id, e)
                await self._answer(lease_id, peer, failed=str(e))
                return
            with contextlib.closing(sock):
                await self._channel(lease_id).ask(
                    "link",
                    [sock.fileno()],
                    peer=peer,
                    to=[to.host, to.port],
                    secure=self._certified,
                )

    async def _answer(self, lease_id: str, peer: str, failed: str) -> None:
        await self._channel(lease_id).ask("link", peer=peer, failed=failed)
