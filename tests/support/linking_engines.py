"""What connects the workers of a lease on several GPU servers: of each server's engine, the part that does that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.models import WorkerAddress
from jupyter_gpupool.engines.local.linking import Linking
from jupyter_gpupool.engines.local.parking import Parking
from jupyter_gpupool.transport.specs import AttachSpec


class LinkingEngines:
    """The engines of several servers, in a thread of their own. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._engines: list[tuple[Parking, Linking]] = []

    def __enter__(self) -> LinkingEngines:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._call(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def introduce(self, folder: Path, spec: AttachSpec, others: Mapping[str, tuple[str, int]]) -> None:
        """Link a worker, whose directory that is, to others by their names and addresses when it asks for them."""

        async def begin() -> None:
            log = logging.getLogger(__name__)
            parking = Parking(str(folder), 1.0, log)
            linking = Linking(parking.channel, spec.secure, log)
            parking.on_link = linking.on_asked
            self._engines.append((parking, linking))
            addresses = {name: WorkerAddress(host, port, 0, 0.0) for name, (host, port) in others.items()}
            await linking.introduce(spec.lease_id, addresses)

        self._call(begin)

    def _call(self, function: Callable[[], Any]) -> None:
        asyncio.run_coroutine_threadsafe(function(), self._loop).result(300)

    async def _stop(self) -> None:
        for parking, linking in self._engines:
            await linking.stop()
            with contextlib.suppress(Exception):
                await parking.stop()
