"""The GPUs that are kept for a request at the head of the queue. Pure.

Nobody knows when a lease ends, so no grant can be shown to be over before the head needs its memory. What can be known
is which leases have to end before the head starts. The head reserves the GPUs for which the fewest leases have to end.
A later request may use only memory that the head does not need there once those leases have ended. So a grant that
overtakes the head never adds a lease to those that it waits for.

The reservation is chosen again at each change: if other GPUs need fewer leases to end, it moves there.

Where leases may move, they need not end. Then the head reserves the GPUs whose leases find room elsewhere, or miss the
least of it, and that room too. Once all of them have found some, they move, and the head starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jupyter_gpupool.core.models import GPU, Lease, Request, Server, Slice

from . import placement
from .relocation import FreeRoom, Relocation


class Share(NamedTuple):
    """What one lease holds of a GPU, and on how many GPUs it holds something."""

    memory_mib: int
    gpus: int


#: The leases on a GPU, by its uuid: what each of them holds there, by lease id.
LeasesOn = Callable[[str], Mapping[str, Share]]


class Movable(NamedTuple):
    """Which leases may move. ``find``: the lease with that id if it may move now or is moving, else None;
    ``within_server``: whether it may move to other GPUs of its own server, too."""

    find: Callable[[str], Lease | None]
    within_server: bool = True


#: Fewer leases that have to end first, then less memory that they hold, in GPUs.
Cost = tuple[int, float]


@dataclass(frozen=True)
class Reservation:
    """What is kept for a request: ``slices``, which it will get unless it starts elsewhere earlier.

    ``blocked_mib``: how much of the memory that is free now others must not use, by GPU uuid. ``waits_for``: the ids
    of the leases that have to end first. ``moves``: the new slices of those that can move instead, by lease id.
    """

    slices: tuple[Slice, ...]
    blocked_mib: Mapping[str, int]
    waits_for: frozenset[str]
    moves: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)


class Candidate(NamedTuple):
    """One GPU that the request could get, and what has to end on it first."""

    gpu: GPU
    share_mib: int
    free_mib: int
    ending: Mapping[str, Share]
    unknown: int  # holders that are no lease of the ledger yet, or programs outside the pool

    @property
    def key(self) -> tuple[float, float, int]:
        weight = self.unknown + sum(1 / share.gpus for share in self.ending.values())
        return round(weight, 6), _gpus(self.gpu, self.ending), self.gpu.index


def reserve(
    request: Request,
    servers: Sequence[Server],
    used: Mapping[str, int],
    leases_on: LeasesOn,
    movable: Movable | None = None,
) -> Reservation | None:
    """The reservation for a request that does not fit now; None if no servers could serve it.

    ``used``: MiB granted by GPU uuid. ``movable``: the leases that may move; None: none of them.
    """
    groups = [candidates(placement.eligible(request, server), used, leases_on) for server in servers]
    if request.spread:
        groups = [[candidate for group in groups for candidate in group]]
    if movable is not None:
        return reserve_by_moving(request, groups, FreeRoom(servers, used, movable.within_server), movable)
    best: tuple[Cost, list[Candidate]] | None = None
    for group in groups:
        found = choose(group, request.num_gpus)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return None if best is None else reservation(request, best[1])


def candidates(
    gpus: Sequence[tuple[GPU, int]], used: Mapping[str, int], leases_on: LeasesOn
) -> list[Candidate]:
    """Each of these :func:`.placement.eligible` GPUs, with the fewest leases that have to end on it."""
    found = []
    for gpu, share in gpus:
        free = gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0)
        missing = share - free
        ending: dict[str, Share] = {}
        if missing > 0:
            ending = _fewest(leases_on(gpu.uuid), missing)
            missing -= sum(held.memory_mib for held in ending.values())
        found.append(Candidate(gpu, share, max(0, free), ending, int(missing > 0)))
    return found


def _fewest(leases: Mapping[str, Share], missing_mib: int) -> dict[str, Share]:
    """The fewest of a GPU's leases that have so much of it together: the smallest that is enough, or the largest."""
    order = sorted(leases.items(), key=lambda item: (-item[1].memory_mib, item[1].gpus))
    enough = [item for item in order if item[1].memory_mib >= missing_mib]
    if enough:
        return dict([min(enough, key=lambda item: (item[1].memory_mib, item[1].gpus))])
    ending: dict[str, Share] = {}
    for lease_id, held in order:
        if missing_mib <= 0:
            break
        ending[lease_id] = held
        missing_mib -= held.memory_mib
    return ending


def choose(group: Sequence[Candidate], count: int) -> tuple[Cost, list[Candidate]] | None:
    """``count`` of these GPUs for which the fewest leases have to end, and the cost."""
    if len(group) < count:
        return None
    chosen = sorted(group, key=lambda candidate: candidate.key)[:count]
    ending = {lease_id for candidate in chosen for lease_id in candidate.ending}
    amount = sum(_gpus(candidate.gpu, candidate.ending) for candidate in chosen)
    return (len(ending) + sum(candidate.unknown for candidate in chosen), round(amount, 6)), chosen


class _Option(NamedTuple):
    """GPUs that the head could get. ``stuck``: how many of their leases have to end; ``leases``: those that may move;
    ``min_missing``: a lower bound of the room that is missing for them, as a part of all GPUs of their models;
    ``amount``: what they hold, in GPUs."""

    stuck: int
    min_missing: float
    amount: float
    chosen: Sequence[Candidate]
    leases: Sequence[Lease]


def reserve_by_moving(
    request: Request, groups: Iterable[Sequence[Candidate]], room: FreeRoom, movable: Movable
) -> Reservation | None:
    """The GPUs for which the fewest leases have to end, then the least room is missing, then the fewest have to move.

    What is missing counts as a part of all GPUs of its model: room comes soonest where most leases may end.

    ``groups``: of each server, or of all of them if the request may use several.
    """
    best: tuple[tuple[int, float, int, float], _Option, Relocation] | None = None
    options = list(_options(groups, request.num_gpus, room, movable))
    options.sort(key=lambda option: (*option[:2], len(option.leases), option.amount))
    for option in options:
        if best is not None and (*option[:2], len(option.leases), option.amount) >= best[0]:
            break  # none of the rest is better
        relocation = room.relocate(option.leases, [candidate.gpu for candidate in option.chosen])
        cost = option.stuck, relocation.missing, len(option.leases), option.amount
        if best is None or cost < best[0]:
            best = cost, option, relocation
    if best is None:
        return None
    _, option, relocation = best
    blocked = blocked_mib(option.chosen)
    for pieces in relocation.moves.values():
        for piece in pieces:
            blocked[piece.gpu_uuid] = blocked.get(piece.gpu_uuid, 0) + piece.memory_mib
    ending = {lease_id for candidate in option.chosen for lease_id in candidate.ending}
    return Reservation(
        placement.slices(request, [candidate.gpu for candidate in option.chosen]),
        blocked,
        frozenset(ending - relocation.moves.keys()),
        relocation.moves,
    )


def _options(
    groups: Iterable[Sequence[Candidate]], count: int, room: FreeRoom, movable: Movable
) -> Iterator[_Option]:
    for group in groups:
        if len(group) < count:
            continue
        some = [[one] for one in group] if count == 1 else [sorted(group, key=lambda one: one.key)[:count]]
        for chosen in some:
            here = {candidate.gpu.uuid for candidate in chosen}
            ending = {id: movable.find(id) for candidate in chosen for id in candidate.ending}
            known = [lease for lease in ending.values() if lease is not None]
            leases = [lease for lease in known if not lease.moving_to]
            # Those that leave these GPUs cost nothing more; those that arrive on them have to end.
            leaving = {lease.id for lease in known if lease.moving_to and not here & _uuids(lease.moving_to)}
            stuck = len(ending) - len(leases) - len(leaving)
            stuck += sum(candidate.unknown for candidate in chosen)
            amount = sum(
                share.memory_mib / candidate.gpu.memory_mib
                for candidate in chosen
                for lease_id, share in candidate.ending.items()
                if lease_id not in leaving
            )
            min_missing = room.min_missing(leases, [candidate.gpu for candidate in chosen])
            yield _Option(stuck, min_missing, round(amount, 6), chosen, leases)


def reservation(request: Request, chosen: Sequence[Candidate]) -> Reservation:
    """The reservation of those GPUs."""
    return Reservation(
        placement.slices(request, [candidate.gpu for candidate in chosen]),
        blocked_mib(chosen),
        frozenset(lease_id for candidate in chosen for lease_id in candidate.ending),
    )


def blocked_mib(chosen: Sequence[Candidate]) -> dict[str, int]:
    """How much of the memory that is free now others must not use, by GPU uuid."""
    blocked = {}
    for candidate in chosen:
        freed = sum(share.memory_mib for share in candidate.ending.values())
        spare = candidate.free_mib + freed - candidate.share_mib  # what the request will leave
        blocked[candidate.gpu.uuid] = candidate.free_mib - min(candidate.free_mib, max(0, spare))
    return blocked


def _uuids(pieces: Iterable[Slice]) -> set[str]:
    return {piece.gpu_uuid for piece in pieces}


def _gpus(gpu: GPU, shares: Mapping[str, Share]) -> float:
    return sum(share.memory_mib for share in shares.values()) / gpu.memory_mib
