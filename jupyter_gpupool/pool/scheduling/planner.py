"""Which idle leases are parked to make room for the one that has waited longest. Pure: values in, a plan out.

Parking disturbs a user, so the fewest leases are parked. Of plans with as many, the one that copies the fewest MiB goes
first, then the one whose leases have been idle for longest.

For up to :data:`MAX_WIDE` idle leases with several of a server's GPUs, and :data:`MAX_NARROW` with one GPU on each, the
plan is the cheapest that there is. Of more leases, those are considered that free the most memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from jupyter_gpupool.core.models import GPU, Slice

MAX_WIDE = 8
MAX_NARROW = 8

#: How many leases are parked, the MiB that are copied, and minus the seconds that they have been idle.
Cost = tuple[int, int, float]
FREE: Cost = (0, 0, 0.0)


@dataclass(frozen=True)
class IdleLease:
    """A lease that may be parked. ``used_mib``: what it has in its GPUs' memory, and needs in the host's.

    ``is_clean``: a copy of that is up to date, so that parking copies nothing. ``by_server``: those MiB by server, of a
    lease that spans servers.
    """

    id: str
    slices: tuple[Slice, ...]
    idle_s: float
    used_mib: int
    is_clean: bool = False
    by_server: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def host_mib(self) -> Mapping[str, int]:
        """What it needs of each server's host memory."""
        return self.by_server or {self.slices[0].server: self.used_mib}

    @property
    def cost(self) -> Cost:
        """What parking it costs."""
        return 1, 0 if self.is_clean else self.used_mib, -self.idle_s


@dataclass(frozen=True)
class Plan:
    """The leases to park, and what that costs."""

    lease_ids: tuple[str, ...]
    cost: Cost


def plan(
    groups: Iterable[Sequence[tuple[GPU, int]]],
    count: int,
    used: Mapping[str, int],
    idle: Sequence[IdleLease],
    host_mib: Mapping[str, int],
) -> Plan | None:
    """The cheapest way to make room on ``count`` GPUs of one group; None if there is none, or if there is room.

    ``groups``: GPUs that may serve together, each with the MiB that is wanted of it. ``used``: MiB granted by GPU uuid.
    ``idle``: the leases that may be parked. ``host_mib``: host memory that is free for parked leases, by server.
    """
    found = [_Group(list(group), count, used, idle, host_mib).best() for group in groups]
    plans = [one for one in found if one is not None]
    if any(not one.lease_ids for one in plans):
        return None
    return min(plans, key=lambda one: (one.cost, one.lease_ids), default=None)


@dataclass
class _Choice:
    """What is parked on a GPU besides the leases that have several GPUs."""

    cost: Cost = FREE
    leases: tuple[IdleLease, ...] = ()


@dataclass
class _Group:
    gpus: list[tuple[GPU, int]]
    count: int
    used: Mapping[str, int]
    idle: Sequence[IdleLease]
    host_mib: Mapping[str, int]
    _choices: dict[tuple[str, int], _Choice | None] = field(default_factory=dict)

    def best(self) -> Plan | None:
        """The cheapest plan for this group; it parks nothing if there is room."""
        if len(self.gpus) < self.count:
            return None
        here = {gpu.uuid for gpu, _ in self.gpus}
        narrow: dict[str, list[IdleLease]] = {uuid: [] for uuid in here}
        wide = []
        for lease in self.idle:
            on = [piece for piece in lease.slices if piece.gpu_uuid in here]
            if not on or not self._has_host_memory([lease]):
                continue
            if len(on) == 1:
                narrow[on[0].gpu_uuid].append(lease)
            else:
                wide.append(lease)
        self._narrow = {uuid: _largest(leases, uuid, MAX_NARROW) for uuid, leases in narrow.items()}
        wide = sorted(wide, key=lambda lease: (-_mib(lease.slices, here), lease.cost, lease.id))[:MAX_WIDE]
        found: Plan | None = None
        for size in range(len(wide) + 1):
            if found is not None and size > found.cost[0]:
                break
            for some in combinations(wide, size):
                one = self._with(some)
                if one is not None and (
                    found is None or (one.cost, one.lease_ids) < (found.cost, found.lease_ids)
                ):
                    found = one
        return found

    def _with(self, wide: Sequence[IdleLease]) -> Plan | None:
        """The cheapest plan that parks exactly these leases of those that have several GPUs."""
        freed: dict[str, int] = {}
        for lease in wide:
            for piece in lease.slices:
                freed[piece.gpu_uuid] = freed.get(piece.gpu_uuid, 0) + piece.memory_mib
        choices = []
        for gpu, share in self.gpus:
            free = gpu.memory_mib - gpu.taken_mib - self.used.get(gpu.uuid, 0) + freed.get(gpu.uuid, 0)
            choice = self._on(gpu, share - free)
            if choice is not None:
                choices.append((choice.cost, gpu.index, gpu.uuid, choice.leases))
        if len(choices) < self.count:
            return None
        chosen = sorted(choices, key=lambda choice: choice[:3])[: self.count]
        leases = [*wide, *(lease for *_, some in chosen for lease in some)]
        for lease in tuple(leases):
            others = [one for one in leases if one is not lease]
            if self._has_room(others):
                leases = others
        if not self._has_host_memory(leases):
            return None
        ids = tuple(sorted(lease.id for lease in leases))
        return Plan(ids, _sum(leases))

    def _has_host_memory(self, parked: Iterable[IdleLease]) -> bool:
        needed: dict[str, int] = {}
        for lease in parked:
            for server, mib in lease.host_mib.items():
                needed[server] = needed.get(server, 0) + mib
        return all(mib <= self.host_mib.get(server, 0) for server, mib in needed.items())

    def _has_room(self, parked: Sequence[IdleLease]) -> bool:
        roomy = 0
        for gpu, share in self.gpus:
            freed = sum(_mib(lease.slices, {gpu.uuid}) for lease in parked)
            roomy += gpu.memory_mib - gpu.taken_mib - self.used.get(gpu.uuid, 0) + freed >= share
        return roomy >= self.count

    def _on(self, gpu: GPU, missing_mib: int) -> _Choice | None:
        """The cheapest leases with one GPU of the group that free so much of it; None if all of them do not."""
        if missing_mib <= 0:
            return _Choice()
        key = gpu.uuid, missing_mib
        if key not in self._choices:
            self._choices[key] = self._cheapest(self._narrow[gpu.uuid], gpu.uuid, missing_mib)
        return self._choices[key]

    def _cheapest(self, leases: Sequence[IdleLease], uuid: str, missing_mib: int) -> _Choice | None:
        for size in range(1, len(leases) + 1):
            some = [
                (_sum(some), tuple(lease.id for lease in some), some)
                for some in combinations(leases, size)
                if sum(_mib(lease.slices, {uuid}) for lease in some) >= missing_mib
            ]
            if some:
                cost, _, chosen = min(some, key=lambda entry: entry[:2])
                return _Choice(cost, chosen)
        return None


def _largest(leases: Sequence[IdleLease], uuid: str, count: int) -> list[IdleLease]:
    return sorted(leases, key=lambda lease: (-_mib(lease.slices, {uuid}), lease.cost, lease.id))[:count]


def _mib(slices: Sequence[Slice], uuids: set[str]) -> int:
    return sum(piece.memory_mib for piece in slices if piece.gpu_uuid in uuids)


def _sum(leases: Iterable[IdleLease]) -> Cost:
    costs = [lease.cost for lease in leases]
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs), sum(cost[2] for cost in costs)
