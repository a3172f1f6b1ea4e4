"""The point at which the workers of a lease that spans servers wait for each other."""

from __future__ import annotations

import asyncio

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease, Slice, WorkerAddress

from .node import Node


class Meeting:
    """The point at which a lease's workers wait until all can start; ``failure``: why one of them could not."""

    def __init__(self, expected: int) -> None:
        self._expected = self._missing = expected
        self._over = asyncio.Event()
        self.failure: BaseException | None = None

    async def attended(self, node: Node, lease: Lease, pieces: tuple[Slice, ...]) -> WorkerAddress:
        try:
            return await node.start(lease, pieces, self._arrive if self._expected > 1 else None)
        except BaseException as e:
            self.failure = self.failure or e
            self._over.set()
            raise

    async def _arrive(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._over.set()
        await self._over.wait()
        if self.failure is not None:
            raise EngineError("another GPU server of the lease is not ready")
