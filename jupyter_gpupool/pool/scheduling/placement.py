"""Which GPUs a request gets. Pure: values in, slices out; nothing is read, written or remembered.

A lease's GPUs are on one server, unless the request may use several (``spread``). Among those with room a
:class:`~.policy.PlacementPolicy` chooses. This module defines the answer; :mod:`.placement_index` finds the same
answer among thousands of GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from jupyter_gpupool.core.errors import ImpossibleRequest, NoCapacity
from jupyter_gpupool.core.models import GPU, Lease, Request, Server, Slice
from jupyter_gpupool.core.validation import check_memory, validate

from .policy import FEW_SERVERS, PlacementPolicy, Room

#: How many users ask for each GPU model by its name: 0 for the fewest, then 1, 2, …; 0 for models that it lacks.
Demand = Mapping[str, int]
NO_DEMAND: Demand = {}

__all__ = ["equivalents", "impossible", "matches", "place", "resized", "share_mib", "validate"]


def share_mib(request: Request, gpu: GPU) -> int:
    """The MiB that the request takes of that GPU: ``memory_mib``, or ``floor(p × GPU memory)``.

    The fraction is the decimal number as written: 0.29 of 100 MiB are 29, although ``0.29 * 100`` is less than 29
    in binary floating point.
    """
    if request.memory_mib is not None:
        return request.memory_mib
    return _floor(float(request.partial or 0), gpu.memory_mib)


@lru_cache(4096)
def _floor(partial: float, memory_mib: int) -> int:
    return math.floor(Fraction(repr(partial)) * memory_mib)


def matches(request: Request, gpu: GPU) -> bool:
    """Whether the GPU passes every filter of the request."""
    return all(_passes(key, value, gpu) for key, value in request.filters.items())


def place(
    request: Request,
    servers: Sequence[Server],
    used: Mapping[str, int],
    policy: PlacementPolicy = FEW_SERVERS,
    demand: Demand = NO_DEMAND,
) -> tuple[Slice, ...] | None:
    """The slices for a valid request, or None if they are not free now.

    ``used``: MiB granted by GPU uuid; GPUs that it does not name are idle. ``demand``: the models that users ask for
    by name, ranked; of equal GPUs, those that fewer ask for go first. The slices are on distinct healthy GPUs,
    ordered by server and index: of one server, or of several if the request may spread. Among equals the first
    server and the lowest indices win, so the same question has the same answer.
    """
    if request.spread:
        rooms = [room(eligible(request, server), used, policy) for server in servers]
        across = policy.choose_across(rooms, request.num_gpus)
        return None if across is None else slices(request, across)
    best: tuple[Any, list[GPU]] | None = None
    for server in servers:
        found = choose_on_server(eligible(request, server), request.num_gpus, used, policy, demand)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return None if best is None else slices(request, best[1])


def eligible(request: Request, server: Server) -> list[tuple[GPU, int]]:
    """The GPUs of one server that may serve the request, with the MiB that it takes of each."""
    return [(gpu, share_mib(request, gpu)) for gpus in _servers_for(request, [server]) for gpu in gpus]


def choose_on_server(
    gpus: Sequence[tuple[GPU, int]],
    count: int,
    used: Mapping[str, int],
    policy: PlacementPolicy,
    demand: Demand = NO_DEMAND,
) -> tuple[Any, list[GPU]] | None:
    """The first ``count`` of one server's :func:`eligible` GPUs with room, and the policy's key for that server."""
    found = room(gpus, used, policy)
    if len(found) < count:
        return None
    chosen = [gpu for _, gpu in found[:count]]
    rank = max(demand.get(gpu.name, 0) for gpu in chosen) if demand else 0
    whole_left = sum(not used.get(gpu.uuid) and not gpu.taken_mib for _, gpu in found[count:])
    return policy.server_key([left_mib for left_mib, _ in found[:count]], rank, whole_left), chosen


def room(gpus: Sequence[tuple[GPU, int]], used: Mapping[str, int], policy: PlacementPolicy) -> Room:
    """The :func:`eligible` GPUs of one server that have room, in the policy's order, with the MiB left of each."""
    found = []
    for gpu, share in gpus:
        rest = gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0) - share
        if rest >= 0:
            found.append((rest, gpu))
    found.sort(key=lambda entry: (policy.gpu_key(*entry), entry[1].index))
    return found


def slices(request: Request, gpus: Sequence[GPU]) -> tuple[Slice, ...]:
    """The request's slices of those GPUs, ordered by server and index."""
    return in_order(_slice(request, gpu) for gpu in gpus)


def in_order(pieces: Iterable[Slice]) -> tuple[Slice, ...]:
    """A lease's slices as its holder numbers them."""
    return tuple(sorted(pieces, key=lambda piece: (piece.server, piece.index)))


def resized(
    lease: Lease, servers: Sequence[Server], used: Mapping[str, int], partial: float | None, mib: int | None
) -> tuple[Slice, ...]:
    """The lease's slices with another share of the same GPUs.

    Raises InvalidRequest, ImpossibleRequest for more than a GPU has, and NoCapacity for more than is free on it.
    """
    check_memory(partial, mib)
    wanted = replace(lease.request, partial=partial, memory_mib=mib)
    gpus = {gpu.uuid: gpu for server in servers for gpu in server.gpus}
    pieces = []
    for piece in lease.slices:
        gpu = gpus.get(piece.gpu_uuid) or _gpu(piece)
        share = share_mib(wanted, gpu)
        if share < 1:
            raise ImpossibleRequest(f"{partial} of a GPU with {gpu.memory_mib} MiB is less than 1 MiB")
        if share > gpu.memory_mib:
            raise ImpossibleRequest(
                f"{share} MiB per GPU asked for, but GPU {gpu.index} has {gpu.memory_mib} MiB"
            )
        free = max(0, gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0))
        if share > piece.memory_mib and share - piece.memory_mib > free:
            raise NoCapacity(
                f"GPU {gpu.index} of {gpu.server} has {free} MiB free: the slice of {piece.memory_mib} MiB there "
                f"can grow to {piece.memory_mib + free} MiB, not to {share}; it stays as it is"
            )
        pieces.append(replace(piece, memory_mib=share))
    return tuple(pieces)


def impossible(request: Request, servers: Sequence[Server]) -> str | None:
    """Why these servers could not grant the request even if they were idle; None if they could."""
    asked = request.num_gpus
    drained = [server.name for server in servers if server.draining]
    every = [gpu for server in servers if not server.draining for gpu in server.gpus]
    healthy = [gpu for gpu in every if gpu.healthy]
    if not every:
        return "the pool has no GPUs" + (f" but those of {_names(drained)}" if drained else "")
    if asked > len(healthy):
        broken = len(every) - len(healthy)
        return f"{_gpus(asked)} asked for, but the pool has {len(every)}" + (
            f", {broken} of them unhealthy" if broken else f" besides {_names(drained)}" if drained else ""
        )
    matching = [gpu for gpu in healthy if matches(request, gpu)]
    if asked > len(matching):
        wanted = ", ".join(f"{key}={value}" for key, value in sorted(request.filters.items()))
        names = ", ".join(sorted({f"{gpu.name} on {gpu.server}" for gpu in healthy}))
        return (
            f"{_gpus(asked)} with {wanted} asked for, but {len(matching)} of the pool's match; it has {names}"
        )
    fitting = [gpu for gpu in matching if 1 <= share_mib(request, gpu) <= gpu.memory_mib]
    if asked > len(fitting):
        largest = max(gpu.memory_mib for gpu in matching)
        if request.memory_mib is None:
            return f"{request.partial} of a GPU with {largest} MiB is less than 1 MiB"
        if fitting:
            return (
                f"{_gpus(asked)} with {request.memory_mib} MiB each asked for, "
                f"but only {len(fitting)} of the pool's have as much"
            )
        return f"{request.memory_mib} MiB per GPU asked for, but the largest that fits has {largest} MiB"
    most = max((len(gpus) for gpus in _servers_for(request, servers)), default=0)
    if asked > most and not request.spread:
        return (
            f"{_gpus(asked)} on one server asked for, but no server has more than {most} that fit; "
            "ask with --spread (spread=True) to have them on several servers"
        )
    return None


def demand_by_model(asked: Mapping[str, int], servers: Sequence[Server]) -> Demand:
    """Rank the pool's models. ``asked``: how many requests had each text in their filter ``name``."""
    names = {gpu.name for server in servers for gpu in server.gpus}
    counts = {
        name: sum(times for text, times in asked.items() if text.strip().lower() in name.lower())
        for name in names
    }
    ranks = {count: rank for rank, count in enumerate(sorted(set(counts.values())))}
    return {name: ranks[count] for name, count in counts.items() if ranks[count]}


def equivalents(request: Request, servers: Sequence[Server]) -> float:
    """How many whole GPUs the request amounts to, for the fair share of namespaces."""
    if request.partial is not None:
        return request.num_gpus * float(request.partial)
    sizes = [gpu.memory_mib for server in servers for gpu in server.gpus if matches(request, gpu)]
    return request.num_gpus * ((request.memory_mib or 0) / max(sizes) if sizes else 1.0)


def _servers_for(request: Request, servers: Sequence[Server]) -> Iterator[list[GPU]]:
    """Groups of GPUs that may serve one lease together: here, those of one server."""
    for server in servers:
        if server.draining:
            continue
        yield [
            gpu
            for gpu in server.gpus
            if gpu.healthy and matches(request, gpu) and 1 <= share_mib(request, gpu) <= gpu.memory_mib
        ]


def _names(drained: Sequence[str]) -> str:
    return f"{', '.join(drained)}, where an administrator lets nothing new be placed"


def _passes(key: str, value: str, gpu: GPU) -> bool:
    value = value.strip()
    if key == "name":
        return value.lower() in gpu.name.lower()
    if key == "server":
        return value == gpu.server
    if key == "uuid":
        return value.lower() == gpu.uuid.lower()
    if key == "index":
        return int(value) == gpu.index
    if key == "emulated":
        return (value.lower() == "true") == gpu.emulated
    return False


def _gpu(piece: Slice) -> GPU:
    """The GPU of a slice whose server is absent."""
    return GPU(piece.gpu_uuid, piece.server, piece.index, piece.name, piece.total_mib, piece.emulated)


def _slice(request: Request, gpu: GPU) -> Slice:
    return Slice(
        gpu_uuid=gpu.uuid,
        server=gpu.server,
        index=gpu.index,
        name=gpu.name,
        memory_mib=share_mib(request, gpu),
        total_mib=gpu.memory_mib,
        emulated=gpu.emulated,
    )


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
