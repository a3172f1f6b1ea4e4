"""Which GPUs a request gets. Pure: values in, slices out; nothing is read, written or remembered.

The policy is best fit: of all GPUs with room, those that are left with the least; so big requests
find big gaps for longer. A lease's GPUs are on one server. Where the request lets them spread and no
server has room for all, they are on as few servers as possible: those with room on the most GPUs, and
for the rest the server that it fits best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from .errors import ImpossibleRequest, NoCapacity
from .models import GPU, Lease, Request, Server, Slice
from .validation import check_memory, validate

__all__ = ["equivalents", "impossible", "matches", "place", "resized", "share_mib", "validate"]


def share_mib(request: Request, gpu: GPU) -> int:
    """The MiB that the request takes of that GPU: ``memory_mib``, or ``floor(p × GPU memory)``.

    The fraction is taken as the decimal number that was written: 0.29 of 100 MiB are 29, although
    ``0.29 * 100`` is less than 29 in binary floating point.
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


def place(request: Request, servers: Sequence[Server], used: Mapping[str, int]) -> tuple[Slice, ...] | None:
    """The slices for a valid request, or None when they are not free now.

    ``used`` is the MiB granted by GPU uuid; GPUs that it does not name are idle. The slices are on
    distinct healthy GPUs of one server (of several, where the request spreads and none has room for
    all), ordered by server and index. Among equals the first server and the
    lowest indices win, so the same question has the same answer.
    """
    if request.spread:
        across = few_servers([room(eligible(request, s), used) for s in servers], request.num_gpus)
        return None if across is None else slices(request, across)
    best: tuple[int, list[GPU]] | None = None
    for server in servers:
        found = best_fit(eligible(request, server), request.num_gpus, used)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return None if best is None else slices(request, best[1])


def eligible(request: Request, server: Server) -> list[tuple[GPU, int]]:
    """The GPUs of one server that may serve the request, with the MiB that it would take of each."""
    return [(gpu, share_mib(request, gpu)) for gpus in _servers_for(request, [server]) for gpu in gpus]


def best_fit(
    gpus: Sequence[tuple[GPU, int]], count: int, used: Mapping[str, int]
) -> tuple[int, list[GPU]] | None:
    """Of :func:`eligible` GPUs so many, those left with the least, and the MiB that would be left of them together."""
    chosen = room(gpus, used)[:count]
    if len(chosen) < count:
        return None
    return sum(rest for rest, _ in chosen), [gpu for _, gpu in chosen]


def room(gpus: Sequence[tuple[GPU, int]], used: Mapping[str, int]) -> list[tuple[int, GPU]]:
    """Those :func:`eligible` GPUs that have room, with the MiB that would be left of them; the least first."""
    found = []
    for gpu, share in gpus:
        rest = gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0) - share
        if rest >= 0:
            found.append((rest, gpu))
    found.sort(key=lambda entry: (entry[0], entry[1].index))
    return found


def few_servers(rooms: Sequence[list[tuple[int, GPU]]], count: int) -> list[GPU] | None:
    """So many GPUs of as few servers as possible; ``rooms`` is the :func:`room` of each server."""

    def left(n: int, most: int) -> int:
        return sum(rest for rest, _ in rooms[n][:most])

    chosen: list[GPU] = []
    order = sorted(range(len(rooms)), key=lambda n: (-len(rooms[n]), left(n, count), n))
    for place, n in enumerate(order):
        if not rooms[n]:
            break
        if len(rooms[n]) < count - len(chosen):
            chosen += [gpu for _, gpu in rooms[n]]
            continue
        rest = count - len(chosen)
        last = min((m for m in order[place:] if len(rooms[m]) >= rest), key=lambda m: (left(m, rest), m))
        return chosen + [gpu for _, gpu in rooms[last][:rest]]
    return None


def slices(request: Request, gpus: Sequence[GPU]) -> tuple[Slice, ...]:
    """Those GPUs' shares, in the order of their servers' names and their indices."""
    return in_order(_slice(request, gpu) for gpu in gpus)


def in_order(pieces: Iterable[Slice]) -> tuple[Slice, ...]:
    """A lease's slices as its holder numbers them."""
    return tuple(sorted(pieces, key=lambda piece: (piece.server, piece.index)))


def resized(
    lease: Lease, servers: Sequence[Server], used: Mapping[str, int], partial: float | None, mib: int | None
) -> tuple[Slice, ...]:
    """The lease's slices with another share of their GPUs. Raises InvalidRequest, ImpossibleRequest for more than
    a GPU has, and NoCapacity for more than is free on it."""
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
    """The GPU of a slice, when its server is not there to be asked."""
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
