"""``WS events`` of a Jupyter server: those of the pool that it hosts, or relayed from the pool that it joined."""

from __future__ import annotations

import asyncio

from tornado.websocket import WebSocketClientConnection, WebSocketClosedError

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.server.http.events import EventsInJupyter

from .pool_backend import GPUPool


class RelayedEvents(EventsInJupyter):
    """The socket of one watcher.

    For a joined pool, each watcher has a connection of its own to that pool. So it resumes where it was after a break,
    and without watchers there is no connection.
    """

    _relay: asyncio.Task[None] | None = None

    async def open(self, *args: str, **kwargs: str) -> None:
        asked = self.request.query_arguments
        query: dict[str, str] = {
            name: self.get_query_argument(name) for name in asked if name in ("feed", "seq")
        }
        pool = self.feed.pool
        try:
            elsewhere = await pool.events(query) if isinstance(pool, GPUPool) else None
        except PoolError as e:
            self.end(str(e))
            return
        if elsewhere is None:
            await super().open(*args, **kwargs)
        elif self.ws_connection is None:  # the watcher has left meanwhile
            elsewhere.close()
        else:
            self._relay = asyncio.create_task(self._pass_on(elsewhere))

    def on_close(self) -> None:
        super().on_close()
        if self._relay is not None:
            self._relay.cancel()

    async def _pass_on(self, elsewhere: WebSocketClientConnection) -> None:
        try:
            while (message := await elsewhere.read_message()) is not None:
                await self.write_message(message)
            self.end(elsewhere.close_reason or "the GPU pool closed the connection")
        except WebSocketClosedError:
            pass  # the watcher has left
        finally:
            elsewhere.close()
