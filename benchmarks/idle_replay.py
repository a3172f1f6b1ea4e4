"""What parking idle notebooks gives back, and whom it disturbs: a public trace on the real manager, on a virtual clock.

The trace is of a company's notebooks in June 2021, from the authors of NotebookOS. Each of its sessions holds one
lease, with the most GPUs that any of its cells uses, from its first cell to its last. A pool is oversubscribed 2 × if
it has half of the GPUs that the sessions hold together at the busiest moment. Smaller pools get as many sessions, drawn
at random, as make the same ratio. Leases are parked when somebody waits; parking and resuming take no time here.

``resumed``: cells whose lease was parked. ``waited``: those of them that had to wait for another cell or session to
end. ``given_back``: the fraction of all reserved GPU-hours in which a lease was parked, or idle for long enough to be
parked for the next who asks; ``parked``: the first part of it alone.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.models import Lease, LeaseState, Reclaim, Request
from jupyter_gpupool.pool.reclaim import ReclaimPolicy

from .replay import NoTrace, Replay, gpu_server, means, read_csv, replay

SOURCE = (
    "https://github.com/ds2-lab/NotebookOS-Dashboard, "
    "driver-backend/scripts/tiresias_generator/sensei_june_60sec.csv"
)
FOLDER, FILE = "notebook-trace-2021", "sensei_june_60sec.csv"
GPUS_OF_A_SERVER = 8
SMALL_POOLS, SEEDS = (16, 32), range(5)
#: Of the pool's defaults, how long a lease must have been idle.
AFTER_S = ReclaimPolicy().after_s

GOALS = {
    "waited_at_2x": ("<=", 0),
    "resumed_at_2x": ("<=", 0.015),
    "given_back_at_2x": (">=", 0.65),
    "waited_at_2.5x": ("<=", 0.01),
}


@dataclass(frozen=True)
class Cell:
    """One cell: when it began in the trace and how long it computed, in seconds."""

    at: float
    seconds: float


@dataclass
class Session:
    """One session of the trace, and what has become of it."""

    gpus: int
    cells: list[Cell]
    id: str = ""
    next: int = 0
    since: float | None = None  # when its next cell wanted to begin, while that one waits
    began: float = 0.0
    idle_since: float | None = None
    parked_since: float | None = None

    @property
    def begin(self) -> float:
        return self.cells[0].at

    @property
    def end(self) -> float:
        return max(cell.at + cell.seconds for cell in self.cells)


@dataclass
class Totals:
    """What a replay counts; times in GPU-seconds."""

    cells: int = 0
    resumed: int = 0
    waited: int = 0
    waits_s: list[float] = field(default_factory=list)
    reserved: float = 0.0
    parked: float = 0.0
    given_back: float = 0.0
    queued: int = 0


def run() -> dict[str, Any]:
    """Replay all sessions, and draws of them on small pools. Return figures for JSON. Raises NoTrace."""
    sessions = _sessions()
    figures: dict[str, Any] = {"benchmark": "idle_replay", "source": SOURCE, "sessions": len(sessions)}
    for ratio in (2.0, 2.5):
        gpus = math.ceil(_peak(sessions) / ratio / GPUS_OF_A_SERVER) * GPUS_OF_A_SERVER
        found = _replayed(sessions, gpus, ratio)
        figures.update({f"{key}_at_{ratio:g}x": value for key, value in found.items()})
    for gpus in SMALL_POOLS:
        for ratio in (1.5, 2.0):
            drawn = [
                _replayed(_some(sessions, gpus * ratio, random.Random(seed)), gpus, ratio) for seed in SEEDS
            ]
            figures[f"{gpus}_gpus_at_{ratio:g}x"] = means(drawn, 4)
    return figures


def _sessions() -> list[Session]:
    sessions: list[Session] = []
    before = math.inf
    for row in read_csv(FOLDER, FILE, SOURCE):
        at = float(row["submit_time"]) * 60
        if at < before:
            sessions.append(Session(0, []))
        before = at
        session = sessions[-1]
        session.cells.append(Cell(at, float(row["duration"]) * 60))
        session.gpus = max(session.gpus, int(row["num_gpu"]))
    return sessions


def _peak(sessions: Sequence[Session]) -> int:
    changes = [(one.begin, one.gpus) for one in sessions] + [(one.end, -one.gpus) for one in sessions]
    held = peak = 0
    for _, more in sorted(changes):
        held += more
        peak = max(peak, held)
    return peak


def _some(sessions: Sequence[Session], peak: float, rng: random.Random) -> list[Session]:
    """Sessions that hold at most so many GPUs together, and nearly as many."""
    chosen: list[Session] = []
    for session in rng.sample(list(sessions), len(sessions)):
        if _peak([*chosen, session]) <= peak:
            chosen.append(session)
    return chosen


def _replayed(sessions: Sequence[Session], gpus: int, ratio: float) -> dict[str, float]:
    servers = [gpu_server(f"gpu-{n}", GPUS_OF_A_SERVER) for n in range(gpus // GPUS_OF_A_SERVER)]
    totals = Totals()
    policy = ReclaimPolicy(Reclaim.IDLE, oversubscribe=ratio)
    fresh = [Session(one.gpus, one.cells, str(uuid.UUID(int=n))) for n, one in enumerate(sessions)]
    with replay(servers, lambda lease: None, reclaim=policy, may_move=True) as pool:
        _Run(pool, fresh, totals).all()
    return {
        "gpus": gpus,
        "cells": totals.cells,
        "resumed": round(totals.resumed / totals.cells, 4),
        "waited": round(totals.waited / totals.cells, 4),
        "longest_wait_min": round(max(totals.waits_s, default=0.0) / 60, 1),
        "sessions_that_queued": totals.queued,
        "given_back": round(totals.given_back / totals.reserved, 3),
        "parked": round(totals.parked / totals.reserved, 3),
    }


class _Run:
    """Sessions on one pool. Events: a session's next cell begins, or its cell ends."""

    def __init__(self, pool: Replay, sessions: Sequence[Session], totals: Totals) -> None:
        self._pool, self._totals = pool, totals
        self._by_id = {one.id: one for one in sessions}
        self._events = [(one.begin, n, True, one.id) for n, one in enumerate(sessions)]
        self._number = len(sessions)
        self._computing: set[str] = set()
        self._wanting: list[Session] = []  # whose next cell would begin
        self._arenas = {server.name: 10**9 for server in pool.manager.granted()[0]}

    def all(self) -> None:
        heapq.heapify(self._events)
        while self._events:
            with self._pool.ledger.together():
                for _ in range(min(500, len(self._events))):
                    at, _, is_begin, session_id = heapq.heappop(self._events)
                    self._pool.clock.now = self._pool.clock.start + at
                    session = self._by_id[session_id]
                    (self._wants if is_begin else self._ends)(session)
                    self._make_room()
                    self._go_on()

    @property
    def _now(self) -> float:
        return self._pool.clock.elapsed_s

    def _at(self, at: float, is_begin: bool, session: Session) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, is_begin, session.id))

    def _wants(self, session: Session) -> None:
        """The session's next cell would begin."""
        manager, session.since = self._pool.manager, self._now
        self._wanting.append(session)
        self._count_idle(session)
        if session.next == 0:
            session.began = self._now
            request = Request(session.id, "user", num_gpus=session.gpus, partial=1.0, secret_sha256="0" * 64)
            self._pool.took_place(manager.request(request))
        elif manager.lease(session.id).state is LeaseState.PARKED:
            self._totals.resumed += 1
            self._pool.took_place(manager.wake(session.id))

    def _make_room(self) -> None:
        manager = self._pool.manager
        while self._pool.waiting:
            manager.computing(self._computing)
            idle = {
                one.id: WorkerState(GPU_STATE_MIB)
                for one in self._by_id.values()
                if one.idle_since is not None and one.parked_since is None
            }
            parks = manager.find_parks(idle, self._arenas)
            if parks is None:
                return
            change = manager.park(parks, dict.fromkeys((lease.id for lease in parks.leases), GPU_STATE_MIB))
            for lease in change.changed:
                if lease.state is LeaseState.PARKED and lease.id not in self._pool.waiting:
                    self._by_id[lease.id].parked_since = self._now
            self._pool.took_place(change)

    def _go_on(self) -> None:
        """Begin the cells whose sessions have their GPUs."""
        for session in list(self._wanting):
            lease: Lease = self._pool.manager.lease(session.id)
            if lease.state is LeaseState.ACTIVE:
                self._wanting.remove(session)
                self._begin(session)

    def _begin(self, session: Session) -> None:
        assert session.since is not None
        waited_s = self._now - session.since
        if waited_s and session.next == 0:
            self._totals.queued += 1
        elif waited_s:
            self._totals.waited += 1
            self._totals.waits_s.append(waited_s)
        if session.parked_since is not None:
            self._totals.parked += session.gpus * (session.since - session.parked_since)
        session.since = session.parked_since = session.idle_since = None
        self._totals.cells += 1
        self._computing.add(session.id)
        self._pool.manager.computing([session.id])
        self._at(self._now + session.cells[session.next].seconds, False, session)

    def _ends(self, session: Session) -> None:
        """The session's cell has ended, and with its last cell the session."""
        self._computing.discard(session.id)
        self._pool.manager.computing([session.id])
        session.next += 1
        if session.next == len(session.cells):
            self._totals.reserved += session.gpus * (self._now - session.began)
            self._pool.took_place(self._pool.manager.release(session.id))
            return
        session.idle_since = self._now
        self._at(max(self._now, session.cells[session.next].at), True, session)

    def _count_idle(self, session: Session) -> None:
        if session.idle_since is not None:
            free_since = min(
                session.idle_since + AFTER_S,
                math.inf if session.parked_since is None else session.parked_since,
            )
            self._totals.given_back += session.gpus * max(0.0, self._now - free_since)


GPU_STATE_MIB = 1


if __name__ == "__main__":
    try:
        print(json.dumps(run(), indent=2))
    except NoTrace as e:
        sys.exit(f"idle_replay: {e}")
