"""Claim shares of one node's GPUs in Ray: of exactly the GPU that the pool's ledger names, or refuse.

Ray picks the GPU itself, by best fit. If it picks another GPU than the wanted one, the wrong share is kept for a
moment and the rest of that GPU is filled, so that Ray has to pick another one. Then all of that is released.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core.errors import EngineError

from .cluster import Cluster, RayNode
from .fractions import UNIT, assign, foreign

#: How long Ray may take to grant what the ledger shows as free, in seconds: a worker may be about to end.
_GRANT_TIMEOUT_S = 6.0
#: And how much longer where the pool has released a share there itself, less than so many seconds ago: a busy Ray
#: takes its time to count it as free.
_RETURN_TIMEOUT_S = 24.0
_RETURN_MEMORY_S = 60.0
#: How long Ray may take to grant a share that only fills a gap.
_FILLER_TIMEOUT_S = 1.0
#: How long a task may take to return its GPU, in seconds; the first task on a node starts a process.
_TASK_TIMEOUT_S = 30.0
_MAX_ATTEMPTS = 24
#: How long a GPU counts as taken after Ray has refused a share of it, in seconds, unless something changes.
_REFUSAL_MEMORY_S = 15.0


class NoRoom(EngineError):
    """Ray has granted to others what the pool considered free."""


@dataclass
class Claim:
    """A share that Ray has granted: its placement group, the index of its GPU, and its units."""

    group: Any
    units: int
    index: int


class Claims:
    """This pool's shares of one node's GPUs, by lease and GPU index."""

    def __init__(self, cluster: Cluster, node: RayNode) -> None:
        self._cluster = cluster
        self._node = node
        self._lock = asyncio.Lock()
        self._held: dict[str, list[Claim]] = {}
        self._groups: set[str] = set()  # of shares asked for and not known to be gone, by Ray's ids
        self._foreign = 0
        self._taken = [0] * node.gpus
        self._refused: dict[int, float] = {}
        self._returned_at = -math.inf

    def held_by(self, lease_id: str) -> dict[int, int]:
        """Return the units that a lease holds, by GPU index."""
        found: dict[int, int] = {}
        for claim in self._held.get(lease_id, ()):
            found[claim.index] = found.get(claim.index, 0) + claim.units
        return found

    async def take(self, lease_id: str, wanted: Mapping[int, tuple[str, int]]) -> None:
        """Claim shares for a lease: by GPU index, the GPU's uuid and units. Raises NoRoom, and then claims nothing."""
        async with self._lock:
            taken: list[Claim] = []
            try:
                for index, (uuid, units) in wanted.items():
                    taken.append(await self._one(lease_id, uuid, index, units))
            except BaseException:
                for claim in taken:
                    await self._drop(claim.group)
                raise
            self._held.setdefault(lease_id, []).extend(taken)

    async def give_back(self, lease_id: str) -> None:
        """Release a lease's shares."""
        for claim in self._held.pop(lease_id, ()):
            self._returned_at = asyncio.get_running_loop().time()
            await self._drop(claim.group)

    async def change(self, lease_id: str, index: int, uuid: str, units: int) -> None:
        """Change the size of a held share. A larger one may raise NoRoom; a smaller one is exchanged."""
        async with self._lock:
            claims = self._held.get(lease_id, [])
            mine = [claim for claim in claims if claim.index == index]
            now = sum(claim.units for claim in mine)
            if units > now:
                claims.append(await self._one(lease_id, uuid, index, units - now))
            elif units < now:
                for claim in mine:
                    claims.remove(claim)
                    self._returned_at = asyncio.get_running_loop().time()
                    await self._drop(claim.group)
                claims.append(await self._one(lease_id, uuid, index, units))

    def adopt(self, lease_id: str, index: int, units: int, group: Any) -> None:
        """Record a share that was claimed before the pool restarted."""
        self._groups.add(group.id.hex())
        self._held.setdefault(lease_id, []).append(Claim(group, units, index))

    def leases(self) -> list[str]:
        """Return the leases that hold shares here."""
        return list(self._held)

    # -- others

    def look(self, free: Mapping[str, float]) -> bool:
        """Record what is free according to Ray. Return whether that changes what others hold."""
        held = foreign(self._node.gpus, free, list(self._groups))
        now = asyncio.get_running_loop().time()
        before = self.taken()
        if held != self._foreign:
            self._foreign = held
            self._refused.clear()
            self._taken = assign(held, self._ours())
        self._refused = {index: until for index, until in self._refused.items() if until > now}
        return self.taken() != before

    def taken(self) -> list[int]:
        """Return the units that others hold, by GPU index, as far as they are known."""
        ours = self._ours()
        return [
            UNIT - ours[index] if index in self._refused else min(taken, UNIT - ours[index])
            for index, taken in enumerate(self._taken)
        ]

    def _ours(self) -> list[int]:
        ours = [0] * self._node.gpus
        for claims in self._held.values():
            for claim in claims:
                ours[claim.index] += claim.units
        return ours

    # -- one share

    async def _one(self, lease_id: str, uuid: str, index: int, units: int) -> Claim:
        wrong: list[Any] = []
        try:
            for _ in range(_MAX_ATTEMPTS):
                group = await self._ask(lease_id, uuid, units)
                wrong.append(group)
                if not await self._granted(group):
                    break
                got = await self._index_of(group)
                if got == index:
                    wrong.remove(group)
                    return Claim(group, units, index)
                filler = await self._fill(lease_id, uuid, got, units)
                if filler is not None:
                    wrong.append(filler)
        finally:
            for group in wrong:
                await self._drop(group)
        self._refused[index] = asyncio.get_running_loop().time() + _REFUSAL_MEMORY_S
        raise NoRoom(
            f"Ray does not give {units / UNIT:g} of GPU {index} of {self._node.name}: "
            "others in the cluster have taken it meanwhile; ask again"
        )

    async def _granted(self, group: Any) -> bool:
        if await self._cluster.granted(group, _GRANT_TIMEOUT_S):
            return True
        since = asyncio.get_running_loop().time() - self._returned_at
        return since < _RETURN_MEMORY_S and await self._cluster.granted(group, _RETURN_TIMEOUT_S)

    async def _index_of(self, group: Any) -> int:
        if self._node.gpus == 1:
            return 0
        said = await self._cluster.gpu_of(group, _TASK_TIMEOUT_S)
        if said is None:
            raise NoRoom(f"Ray does not report which GPU of {self._node.name} it has given; ask again")
        return int(said)

    async def _fill(self, lease_id: str, uuid: str, index: int, units: int) -> Any:
        """Take the rest of a wrong GPU, so that Ray chooses another one; None if that is not needed or possible."""
        rest = UNIT - self._ours()[index] - units
        if rest < units:
            return None
        group = await self._ask(lease_id, uuid, rest)
        if await self._cluster.granted(group, _FILLER_TIMEOUT_S):
            return group
        await self._drop(group)
        return None

    async def _ask(self, lease_id: str, uuid: str, units: int) -> Any:
        name = self._cluster.claim_name(lease_id, uuid)
        group = await self._cluster.claim(self._node.id, units, name)
        self._groups.add(group.id.hex())
        return group

    async def _drop(self, group: Any) -> None:
        await self._cluster.give_back(group)
        # Ray's figures may still contain it for a moment.
        asyncio.get_running_loop().call_later(10.0, self._groups.discard, group.id.hex())
