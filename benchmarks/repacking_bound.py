"""How short waits could be with any set of moves: ``queue_replay`` as if all leases were packed anew at each event.

``python -m benchmarks.repacking_bound [FILE ...]`` prints the mean wait of requests for 8 GPUs, in minutes, by draw,
first come, first served. Moves take no time, cost nothing and cross models; only a lease's share of a GPU, and the
server of 8 GPUs, cannot be divided.

``packed`` packs fractions largest first, each where it fits best: a way that exists. ``bound`` counts the fewest GPUs
that the fractions could need by a linear program over all ways to fill a GPU: no way is better. Needs scipy.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from jupyter_gpupool.core.models import Server

from .missing import Missing
from .queue_replay import FILES, SEEDS, Arrival, draw
from .replay import GPU_MIB, mean

LOAD = 0.935
#: Smaller fractions are left out of the linear program, where they could only add GPUs.
MIN_SHARE = 220

#: How many leases there are of each share of a GPU, in thousandths.
Shares = Counter[int]
#: How many GPUs such leases take.
GpusFor = Callable[[Shares], int]


def packed(shares: Shares) -> int:
    """How many GPUs these fractions take: the largest go first, each to the GPU that it fits best."""
    free: Counter[int] = Counter()
    gpus = 0
    for share in sorted(shares.elements(), reverse=True):
        best = min((left for left, count in free.items() if count and left >= share), default=None)
        if best is None:
            gpus, best = gpus + 1, GPU_MIB
        else:
            free[best] -= 1
        free[best - share] += 1
    return gpus


def bound(shares: Shares) -> int:
    """The fewest GPUs that these fractions could take, or fewer."""
    sizes = tuple(
        sorted((share for share, count in shares.items() if count and share >= MIN_SHARE), reverse=True)
    )
    return _fewest(sizes, tuple(shares[size] for size in sizes))


@cache
def _fewest(sizes: tuple[int, ...], counts: tuple[int, ...]) -> int:
    try:
        import numpy as np
        from scipy.optimize import linprog
    except ImportError:
        raise Missing("scipy is not installed; pip install scipy") from None
    if not sizes:
        return 0
    ways = np.array(_ways(sizes)).T
    found = linprog(np.ones(ways.shape[1]), A_ub=-ways, b_ub=-np.array(counts), method="highs")
    return math.ceil(float(found.fun) - 1e-6)


@cache
def _ways(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every way to fill a GPU with these sizes so that none of them fits besides: how many of each."""

    def ways(rest: tuple[int, ...], room: int) -> Iterator[tuple[int, ...]]:
        if not rest:
            if room < sizes[-1]:
                yield ()
            return
        for count in range(room // rest[0] + 1):
            yield from ((count, *others) for others in ways(rest[1:], room - count * rest[0]))

    return list(ways(sizes, GPU_MIB))


def waits_s(servers: Sequence[Server], arrivals: Sequence[Arrival], gpus_for: GpusFor) -> dict[str, float]:
    """How long each request waits, by id, first come, first served. ``gpus_for``: how many GPUs fractions take."""
    gpus = sum(len(server.gpus) for server in servers)
    large_servers = sum(len(server.gpus) >= 8 for server in servers)
    shares: Shares = Counter()
    whole, large = 0, 0
    waits: dict[str, float] = {}
    queue: deque[Arrival] = deque()
    numbers = itertools.count()
    events = [(one.at, next(numbers), one, False) for one in arrivals]

    def fits(one: Arrival) -> bool:
        count = one.request.num_gpus
        if count == 8 and large == large_servers:
            return False
        if _share(one) < GPU_MIB:
            room, together = gpus - whole, shares + Counter([_share(one)])
        else:
            room, together = gpus - whole - count, shares
        return packed(together) <= room or gpus_for(together) <= room  # the first is quick

    def change(one: Arrival, more: int) -> None:
        nonlocal whole, large
        if _share(one) < GPU_MIB:
            shares[_share(one)] += more
        else:
            whole += more * one.request.num_gpus
            large += more * (one.request.num_gpus == 8)

    while events:
        at, _, one, is_end = heapq.heappop(events)
        if is_end:
            change(one, -1)
        else:
            queue.append(one)
        while queue and fits(queue[0]):
            one = queue.popleft()
            change(one, 1)
            waits[one.request.id] = at - one.at
            heapq.heappush(events, (at + one.lifetime_s, next(numbers), one, True))
    return waits


def _share(one: Arrival) -> int:
    return round(float(one.request.partial or 0) * GPU_MIB)


def _mean_of_8_gpus_min(servers: Sequence[Server], arrivals: Sequence[Arrival], gpus_for: GpusFor) -> float:
    waits = waits_s(servers, arrivals, gpus_for)
    return mean([waits[one.request.id] / 60 for one in arrivals if one.request.num_gpus == 8])


def main(names: Sequence[str]) -> None:
    """Print both figures for every draw of these files, and their means."""
    for name in names:
        draws = [draw(name, seed, LOAD) for seed in SEEDS]
        for gpus_for in (packed, bound):
            by_draw = [_mean_of_8_gpus_min(*one, gpus_for) for one in draws]
            print(f"{name} {gpus_for.__name__}: {mean(by_draw):.2f} of {[round(one, 2) for one in by_draw]}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or FILES)
    except Missing as e:
        sys.exit(f"repacking_bound: {e}")
