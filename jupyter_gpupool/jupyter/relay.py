"""``WS events`` of a Jupyter server: its own pool's, or, passed on as they come, those of the pool that it joined."""

from __future__ import annotations

import asyncio
from typing import cast

from tornado.websocket import WebSocketClientConnection, WebSocketClosedError

from ..api.events import EventsInJupyter
from ..pool.errors import PoolError
from .user_pool import GPUPool


class EventsWherever(EventsInJupyter):
    """One watcher, who has a connection of their own to a pool elsewhere: they go on there where they were, and
    while nobody watches, nothing is asked of it."""

    _relay: asyncio.Task | None = None

    async def open(self, *args: str, **kwargs: str) -> None:
        asked = self.request.query_arguments
        query: dict[str, str] = {name: self.get_query_argument(name) for name in asked if name in ("feed", "seq")}
        try:
            elsewhere = await cast(GPUPool, self.feed.pool).events(query)
        except PoolError as e:
            self.end(str(e))
            return
        if elsewhere is None:
            await super().open(*args, **kwargs)
        elif self.ws_connection is None:  # it was closed meanwhile
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
            pass  # who watched has gone
        finally:
            elsewhere.close()
