"""Who waits for how long in a full pool: a public trace's requests on the real manager, with a virtual clock.

The trace is Alibaba's cluster-trace-gpu-v2023. 60 servers are drawn from its nodes. Its requests arrive in random
order, again and again, as a Poisson process; their lifetimes are cut at 4 hours. ``multigpu50`` has no times and takes
those of ``default``. Decisions are the manager's; workers start, move and end when it says so.

A load is what would be in use, while it is measured, if nobody waited. The goals are those of 0.935; nearer to 1 the
waits follow the busiest hours of a draw, and those of 0.95 say how much.

``strict_order`` is first come, first served, where nobody overtakes. ``whole_pool`` is a bound that no pool can reach:
first come, first served, on one GPU that is as large as all of them together.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import sys
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core.models import Lease, Request, Server
from jupyter_gpupool.pool.scheduling.placement_index import Granted, PlacementIndex

from .replay import Allocation, NoTrace, gpu_server, mean, means, percentile, read_csv, replay

SOURCE = "https://github.com/alibaba/clusterdata/tree/master/cluster-trace-gpu-v2023"
FOLDER = "gpu-trace-2023"
FILES = ("default", "multigpu50")
REQUESTS, SERVERS, SEEDS = 12_000, 60, (1, 2, 3, 4)
#: The load → how its figures begin.
LOADS = {0.935: "", 0.95: "at_95_"}
MAX_LIFETIME_S = 4 * 3600.0

#: That of the wait on ``default`` is below the bound of these draws: see ``repacking_bound``.
GOALS = {
    "default_allocated": (">=", 0.93),
    "default_wait_of_8_gpus_min": ("<=", 2.0),
    "default_moves_per_lease": ("<=", 0.2),
    "multigpu50_allocated": (">=", 0.93),
    "multigpu50_wait_of_8_gpus_min": ("<=", 6.0),
    "multigpu50_moves_per_lease": ("<=", 0.45),
    "wait_longer_than_in_strict_order": ("<=", 0),
}

#: When each request got its GPUs, by id, and which fraction of the pool was in use.
Outcome = tuple[dict[str, float], float]


@dataclass(frozen=True)
class Arrival:
    """A request of the trace. ``at``: seconds since the beginning."""

    at: float
    request: Request
    lifetime_s: float

    @property
    def gpus(self) -> float:
        return self.request.num_gpus * float(self.request.partial or 0)


def run() -> dict[str, Any]:
    """Replay every file with every load and seed. Return figures for JSON. Raises NoTrace."""
    figures: dict[str, Any] = {"benchmark": "queue_replay", "source": SOURCE, "requests": REQUESTS}
    longer, longest_min, searches = 0, 0.0, []
    for (load, begins), name in itertools.product(LOADS.items(), FILES):
        rows = []
        for seed in SEEDS:
            row, more, more_min, took = _replayed(name, seed, load)
            rows.append(row)
            longer, longest_min, searches = longer + more, max(longest_min, more_min), searches + took
        figures.update({f"{begins}{name}_{key}": value for key, value in means(rows).items()})
        figures[f"{begins}{name}_by_seed"] = {str(seed): row for seed, row in zip(SEEDS, rows, strict=True)}
    figures["wait_longer_than_in_strict_order"] = longer
    figures["longest_such_wait_min"] = round(longest_min, 1)
    figures["search_ms_p50"], figures["search_ms_p99"] = (round(percentile(searches, p), 2) for p in (50, 99))
    return figures


def draw(name: str, seed: int, load: float) -> tuple[list[Server], list[Arrival]]:
    """The servers and requests of one draw. Raises NoTrace."""
    rng = random.Random(f"{name} {seed}")
    nodes = rng.sample(read_csv(FOLDER, "nodes.csv", SOURCE), SERVERS)
    servers = [gpu_server(node["sn"], int(node["gpu"]), node["model"]) for node in nodes]
    return servers, _arrivals(name, rng, _gpus(servers), load)


def _replayed(name: str, seed: int, load: float) -> tuple[dict[str, float], int, float, list[float]]:
    """The figures of one draw; how many wait longer than in strict order, by how much; the searches' times."""
    servers, arrivals = draw(name, seed, load)
    gpus = _gpus(servers)
    begin, end = MAX_LIFETIME_S, arrivals[-1].at  # while the pool fills, nothing is measured
    strict = _in_strict_order(servers, arrivals, Allocation(begin, end))
    bound = _on_whole_pool(gpus, arrivals, Allocation(begin, end))
    overtaking, _, _ = _by_manager(servers, arrivals, Allocation(begin, end), can_move=False)
    ours, moves, took = _by_manager(servers, arrivals, Allocation(begin, end), can_move=True)
    row = {
        "gpus": gpus,
        "offered": round(_offered(arrivals).of(gpus), 3),
        "moves_per_lease": moves / len(arrivals),
    }
    outcomes = {"": ours, "overtaking_only_": overtaking, "strict_order_": strict, "whole_pool_": bound}
    for prefix, (waits, allocated) in outcomes.items():
        large = [waits[one.request.id] / 60 for one in arrivals if one.request.num_gpus == 8]
        row[f"{prefix}allocated"] = allocated
        row[f"{prefix}wait_min"] = mean(list(waits.values())) / 60
        row[f"{prefix}wait_of_8_gpus_min"] = mean(large)
        row[f"{prefix}longest_wait_min"] = max(waits.values()) / 60
    late = [wait - strict[0][lease_id] for lease_id, wait in ours[0].items()]
    return (
        {key: round(value, 3) for key, value in row.items()},
        sum(seconds > 1 for seconds in late),
        max(0.0, *late) / 60,
        took,
    )


def _arrivals(name: str, rng: random.Random, gpus: int, load: float) -> list[Arrival]:
    pods = [pod for pod in read_csv(FOLDER, f"pods_{name}.csv", SOURCE) if int(pod["num_gpu"])]
    timed = [pod for pod in read_csv(FOLDER, "pods_default.csv", SOURCE) if int(pod["num_gpu"])]
    drawn = []
    for pod, other in zip(_in_passes(pods, rng), _in_passes(timed, rng), strict=False):
        count = int(pod["num_gpu"])
        request = Request(
            str(uuid.UUID(int=rng.getrandbits(128))),
            "user",
            num_gpus=count,
            partial=1.0 if count > 1 else int(pod["gpu_milli"]) / 1000,
            secret_sha256="0" * 64,
        )
        drawn.append((request, _lifetime_s(pod if pod.get("deletion_time") else other)))
        if len(drawn) == REQUESTS:
            break
    work = sum(request.num_gpus * float(request.partial or 0) * seconds for request, seconds in drawn)
    span = work / (load * gpus)
    places = sorted(rng.random() for _ in drawn)
    for _ in range(5):  # until the load is that while it is measured, too
        arrivals = [Arrival(place * span, *one) for place, one in zip(places, drawn, strict=True)]
        span *= _offered(arrivals).of(gpus) / load
    return arrivals


def _offered(arrivals: Sequence[Arrival]) -> Allocation:
    """What would be in use if nobody waited."""
    offered = Allocation(MAX_LIFETIME_S, arrivals[-1].at)
    changes = [(one.at, one.gpus) for one in arrivals]
    changes += [(one.at + one.lifetime_s, -one.gpus) for one in arrivals]
    for at, more in sorted(changes):
        offered.change(at, more)
    return offered


def _in_passes(pods: Sequence[dict[str, str]], rng: random.Random) -> Iterator[dict[str, str]]:
    while True:
        yield from rng.sample(pods, len(pods))


def _lifetime_s(pod: dict[str, str]) -> float:
    began = float(pod["scheduled_time"] or pod["creation_time"])
    return max(1.0, min(float(pod["deletion_time"]) - began, MAX_LIFETIME_S))


def _by_manager(
    servers: list[Server], arrivals: Sequence[Arrival], allocation: Allocation, can_move: bool
) -> tuple[Outcome, int, list[float]]:
    """What the manager does; how many leases moved; and how many milliseconds each search for moves took."""
    by_id = {one.request.id: one for one in arrivals}
    waits: dict[str, float] = {}
    events: list[tuple[float, int, Arrival]] = [(one.at, n, one) for n, one in enumerate(arrivals)]

    def granted(lease: Lease) -> None:
        one, now = by_id[lease.id], pool.clock.elapsed_s
        waits[lease.id] = now - one.at
        allocation.change(now, one.gpus)
        heapq.heappush(events, (now + one.lifetime_s, REQUESTS + len(waits), one))

    moves = 0
    with replay(servers, granted, can_move=(lambda lease: True) if can_move else None) as pool:
        while events:
            with pool.ledger.together():
                for _ in range(min(200, len(events))):
                    at, number, one = heapq.heappop(events)
                    pool.clock.now = pool.clock.start + at
                    if number < REQUESTS:
                        pool.took_place(pool.manager.request(one.request))
                    else:
                        allocation.change(at, -one.gpus)
                        pool.took_place(pool.manager.release(one.request.id))
                    moves += pool.move() if can_move else 0
        return (waits, allocation.of(_gpus(servers))), moves, pool.searches_ms


def _in_strict_order(servers: list[Server], arrivals: Sequence[Arrival], allocation: Allocation) -> Outcome:
    index, used = PlacementIndex(servers), Granted({})
    waits: dict[str, float] = {}
    queue: deque[Arrival] = deque()
    events: list[tuple[float, int, Any]] = [(one.at, n, one) for n, one in enumerate(arrivals)]
    while events:
        at, number, what = heapq.heappop(events)
        if number < len(arrivals):
            queue.append(what)
        else:
            for piece in what:
                used.use(piece.gpu_uuid, -piece.memory_mib)
                allocation.change(at, -piece.memory_mib / piece.total_mib)
        while queue and (slices := index.place(queue[0].request, used)) is not None:
            one = queue.popleft()
            waits[one.request.id] = at - one.at
            for piece in slices:
                used.use(piece.gpu_uuid, piece.memory_mib)
                allocation.change(at, piece.memory_mib / piece.total_mib)
            heapq.heappush(events, (at + one.lifetime_s, len(arrivals) + len(waits), slices))
    return waits, allocation.of(_gpus(servers))


def _on_whole_pool(gpus: float, arrivals: Sequence[Arrival], allocation: Allocation) -> Outcome:
    waits: dict[str, float] = {}
    free, now = float(gpus), 0.0
    ends: list[tuple[float, float]] = []
    for one in arrivals:
        now = max(now, one.at)
        while ends and (ends[0][0] <= now or free < one.gpus - 1e-6):
            at, more = heapq.heappop(ends)
            now, free = max(now, at), free + more
            allocation.change(at, -more)
        free -= one.gpus
        waits[one.request.id] = now - one.at
        allocation.change(now, one.gpus)
        heapq.heappush(ends, (now + one.lifetime_s, one.gpus))
    while ends:
        at, more = heapq.heappop(ends)
        allocation.change(at, -more)
    return waits, allocation.of(int(gpus))


def _gpus(servers: Sequence[Server]) -> int:
    return sum(len(server.gpus) for server in servers)


if __name__ == "__main__":
    try:
        print(json.dumps(run(), indent=2))
    except NoTrace as e:
        sys.exit(f"queue_replay: {e}")
