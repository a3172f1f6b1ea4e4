"""Notices changes of the pool by its event stream, so that nobody has to look again and again."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

from jupyter_gpupool.client.event_stream import connect
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import PoolError

#: Seconds between two attempts to connect.
_PAUSE_S = 2.0
#: What of a change is of interest; figures such as utilization change every second.
_PARTS = ("leases", "queue", "servers")

logger = logging.getLogger(__name__)


class PoolWatch:
    """Sets ``changed`` after every change of leases, queue or servers, from a thread of its own."""

    def __init__(self, client: PoolClient, changed: threading.Event) -> None:
        self._client, self._changed = client, changed
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        """Begin to watch; the thread ends with the process."""
        self._thread.start()

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except PoolError as e:
                logger.warning("%s; trying again in %g s", e, _PAUSE_S)
            await asyncio.sleep(_PAUSE_S)

    async def _follow(self) -> None:
        connection = await connect(self._client, {})
        try:
            while (message := await connection.read_message()) is not None:
                if any(part in json.loads(message) for part in _PARTS):
                    self._changed.set()
        finally:
            connection.close()
