"""What the pool knows of the leases that are parked on one node, and its calls of the agent there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.models import Slice

#: Calls a method of the agent by its name. Raises EngineError with its reason.
Ask = Callable[..., Awaitable[dict[str, Any]]]


class NodeParking:
    """``on_wanted`` is called with each parked lease that needs its GPUs, again and again."""

    def __init__(self, ask: Ask, on_wanted: Callable[[str], None]) -> None:
        self._ask = ask
        self._on_wanted = on_wanted
        #: the leases whose state is in host memory there
        self.parked: set[str] = set()
        #: those that could be parked
        self.states: dict[str, WorkerState] = {}
        self.arena_mib = 0
        self._changing: set[str] = set()

    async def park(self, lease_id: str, pieces: Sequence[Slice]) -> int:
        """Park a lease's slices here, and return the MiB that are kept for them. Raises EngineError."""
        said = await self._change("park", lease_id, pieces)
        self.parked.add(lease_id)
        return int(said["mib"])

    async def resume(self, lease_id: str, pieces: Sequence[Slice], first: int = 0) -> None:
        """Bring a lease back, on these slices. ``first``: the number of the first of them. Raises EngineError."""
        await self._change(
            "resume", lease_id, pieces, *([first] if first else [])
        )  # an older agent knows no number
        self.parked.discard(lease_id)

    async def _change(self, what: str, lease_id: str, pieces: Sequence[Slice], *more: int) -> dict[str, Any]:
        self._changing.add(lease_id)
        try:
            return await self._ask(what, lease_id, [asdict(piece) for piece in pieces], *more)
        finally:
            self._changing.discard(lease_id)

    def ended(self, lease_id: str) -> None:
        """The lease has no worker there any more."""
        self.parked.discard(lease_id)
        self.states.pop(lease_id, None)

    def hear(self, said: Mapping[str, Any]) -> None:
        """Take over what the agent says; an older one says nothing. What is just being changed it may not know yet."""
        told = said.get("parking", {})
        self.arena_mib = told.get("arena_mib", 0)
        self.states = {lease_id: WorkerState(*one) for lease_id, one in told.get("states", {}).items()}
        self.parked = (set(told.get("parked", ())) - self._changing) | (self.parked & self._changing)
        for lease_id in said.get("wanted", ()):
            self._on_wanted(lease_id)
