"""The GPUs that are kept for a request at the head of the queue. Pure.

Nobody knows when a lease ends, so no grant can be shown to be over before the head needs its memory. What can be known
is which leases have to end before the head starts. The head reserves the GPUs for which the fewest leases have to end.
A later request may use only memory that the head does not need there once those leases have ended. So a grant that
overtakes the head never adds a lease to those that it waits for.

The reservation is chosen again at each change: if other GPUs need fewer leases to end, it moves there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jupyter_gpupool.core.models import GPU, Request, Server, Slice

from . import placement


class Share(NamedTuple):
    """What one lease holds of a GPU, and on how many GPUs it holds something."""

    memory_mib: int
    gpus: int


#: The leases on a GPU, by its uuid: what each of them holds there, by lease id.
LeasesOn = Callable[[str], Mapping[str, Share]]

#: Fewer leases that have to end first, then less memory that they hold, in GPUs.
Cost = tuple[int, float]


@dataclass(frozen=True)
class Reservation:
    """What is kept for a request: ``slices``, which it will get unless it starts elsewhere earlier.

    ``blocked_mib``: how much of the memory that is free now others must not use, by GPU uuid. ``waits_for``: the ids
    of the leases that have to end first.
    """

    slices: tuple[Slice, ...]
    blocked_mib: Mapping[str, int]
    waits_for: frozenset[str]


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
    request: Request, servers: Sequence[Server], used: Mapping[str, int], leases_on: LeasesOn
) -> Reservation | None:
    """The reservation for a request that does not fit now; None if no servers could serve it.

    ``used``: MiB granted by GPU uuid.
    """
    groups = [candidates(placement.eligible(request, server), used, leases_on) for server in servers]
    if request.spread:
        groups = [[candidate for group in groups for candidate in group]]
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
            for lease_id, held in sorted(
                leases_on(gpu.uuid).items(), key=lambda item: (-item[1].memory_mib, item[1].gpus)
            ):
                ending[lease_id] = held
                missing -= held.memory_mib
                if missing <= 0:
                    break
        found.append(Candidate(gpu, share, max(0, free), ending, int(missing > 0)))
    return found


def choose(group: Sequence[Candidate], count: int) -> tuple[Cost, list[Candidate]] | None:
    """``count`` of these GPUs for which the fewest leases have to end, and the cost."""
    if len(group) < count:
        return None
    chosen = sorted(group, key=lambda candidate: candidate.key)[:count]
    ending = {lease_id for candidate in chosen for lease_id in candidate.ending}
    amount = sum(_gpus(candidate.gpu, candidate.ending) for candidate in chosen)
    return (len(ending) + sum(candidate.unknown for candidate in chosen), round(amount, 6)), chosen


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


def _gpus(gpu: GPU, shares: Mapping[str, Share]) -> float:
    return sum(share.memory_mib for share in shares.values()) / gpu.memory_mib
