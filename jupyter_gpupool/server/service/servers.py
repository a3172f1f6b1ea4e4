"""Records in the ledger which GPU servers the engine has, and which of them are drained."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from jupyter_gpupool.core.errors import NotLeading, PoolError
from jupyter_gpupool.core.models import Change, Server
from jupyter_gpupool.pool.manager import Manager

#: After a failed write to the ledger, seconds until the next attempt.
_RETRY_S = 1.0


class ServerList:
    """The servers of one pool.

    ``run`` makes a change on the manager's thread and carries out its actions; ``spawn`` runs a coroutine in the
    background.
    """

    def __init__(
        self,
        run: Callable[..., Awaitable[Change]],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        log: Any,
    ) -> None:
        self._run = run
        self._spawn = spawn
        self._log = log
        self._unrecorded: Sequence[Server] | None = None

    def update(self, manager: Manager, servers: Sequence[Server]) -> None:
        """Record the servers in the background. Of lists that arrive meanwhile, only the last one is recorded."""
        is_recording = self._unrecorded is not None
        self._unrecorded = servers
        if not is_recording:
            self._spawn(self._record(manager))

    async def drain(self, manager: Manager, server: str, draining: bool) -> None:
        """Place no new leases on a server, or place them again. Its present leases stay."""
        await self._run(manager.drain, server, draining)

    async def _record(self, manager: Manager) -> None:
        while (servers := self._unrecorded) is not None:
            try:
                await self._run(manager.set_servers, servers)
            except NotLeading:
                self._unrecorded = None
                return
            except PoolError as e:
                self._log.error("The pool's servers cannot be recorded yet: %s", e)
                await asyncio.sleep(_RETRY_S)
                continue
            if servers is self._unrecorded:
                self._unrecorded = None
