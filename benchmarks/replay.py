"""What replays of public traces share: the traces, a virtual clock, and a real manager whose engine is simulated."""

from __future__ import annotations

import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.models import GPU, Change, Lease, LeaseState, Server, Slice, WorkerAddress
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.reclaim import Moves

from .missing import Missing

#: Names the folder with the traces, one folder each. They are other people's, and not part of this project.
TRACES = "GPUPOOL_TRACES"
#: A GPU's memory, so that a MiB is a thousandth of it.
GPU_MIB = 1000

_WORKER = WorkerAddress("127.0.0.1", 1, 1, 0.0)


class NoTrace(Missing):
    """The trace is not there; the text says where to get it."""


def read_csv(folder: str, name: str, source: str) -> list[dict[str, str]]:
    """The rows of one file of a trace. Raises NoTrace."""
    traces = os.environ.get(TRACES)
    if not traces:
        raise NoTrace(
            f"no trace is given: put {source} into FOLDER/{folder}, and pass --traces FOLDER or set {TRACES}"
        )
    try:
        with Path(traces, folder, name).open() as file:
            return list(csv.DictReader(file))
    except OSError as e:
        raise NoTrace(f"{e.filename}: {e.strerror}; get it from {source}") from None


def gpu_server(name: str, count: int, model: str = "V100") -> Server:
    """A GPU server with so many GPUs."""
    gpus = (GPU(f"{name}-{n}", name, n, model, GPU_MIB, emulated=True) for n in range(count))
    return Server(name, "127.0.0.1", tuple(gpus))


class Clock:
    """A clock that only moves when it is told to. ``start``: seconds since the epoch at the trace's beginning."""

    start = 1_000_000.0

    def __init__(self) -> None:
        self.now = self.start

    def __call__(self) -> float:
        return self.now

    @property
    def elapsed_s(self) -> float:
        return self.now - self.start


class ReplayedManager(Manager):
    """The real manager. A move is recorded the moment that it is decided."""

    def move(self, moves: Moves) -> Change:
        with self._changing() as change:
            for lease in moves.leases:
                change.park(lease, 0, "")
            for lease in moves.leases:
                change.resume(change.changed[lease.id], moves.slices[lease.id])
            self._grants.grant_waiting(change, self._index)
        return self._done(change)


class Replay:
    """A pool on a virtual clock. ``granted``: what is called with each lease when it gets its GPUs."""

    def __init__(
        self, ledger: Ledger, clock: Clock, manager: ReplayedManager, granted: Callable[[Lease], None]
    ) -> None:
        self.ledger, self.clock, self.manager = ledger, clock, manager
        self._granted = granted
        self.waiting: set[str] = set()
        self.searches_ms: list[float] = []

    def took_place(self, change: Change) -> None:
        """Do what an engine does after a change: workers start at once."""
        for lease in change.changed:
            self.waiting.discard(lease.id)
            if lease.moving_to:
                self.took_place(self.manager.moved(lease.id, _WORKER))
                continue
            if lease.state is LeaseState.QUEUED or lease.is_woken:
                self.waiting.add(lease.id)
            elif lease.state is LeaseState.GRANTED:
                self._granted(lease)
                self.took_place(self.manager.worker_started(lease.id, _WORKER))

    def move(self) -> int:
        """Make room for those that wait by moves, and return how many there were."""
        count = 0
        while self.waiting:
            begun = time.perf_counter()
            moves = self.manager.find_moves()
            self.searches_ms.append((time.perf_counter() - begun) * 1000)
            if moves is None:
                break
            count += len(moves.leases)
            self.took_place(self.manager.move(moves))
            if moves.waiting.id in self.waiting:
                raise AssertionError(f"moves have made no room for lease {moves.waiting.id}")
        return count


@contextmanager
def replay(servers: Sequence[Server], granted: Callable[[Lease], None], **options: Any) -> Iterator[Replay]:
    """A pool of these servers; ``options``: the manager's."""
    with tempfile.TemporaryDirectory(prefix="gpupool-bench-") as folder:
        ledger = Ledger(f"sqlite:///{folder}/ledger.sqlite")
        try:
            clock = Clock()
            manager = ReplayedManager(ledger, clock, ttl_s=1e9, **options)
            manager.set_servers(servers)
            yield Replay(ledger, clock, manager, granted)
        finally:
            ledger.close()


class Allocation:
    """How much of the GPUs is in use over time, from ``since`` to ``until``. In whole GPUs and seconds."""

    def __init__(self, since: float, until: float) -> None:
        self._since, self._until = since, until
        self._at, self._now, self._area = 0.0, 0.0, 0.0

    def change(self, at: float, more: float) -> None:
        self._area += self._now * max(0.0, min(at, self._until) - max(self._at, self._since))
        self._at, self._now = at, self._now + more

    def of(self, gpus: int) -> float:
        """The fraction of so many GPUs that was in use."""
        return self._area / (self._until - self._since) / gpus


def gpus_of(slices: Sequence[Slice]) -> float:
    return sum(piece.memory_mib / piece.total_mib for piece in slices)


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def percentile(values: Sequence[float], of_hundred: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * of_hundred // 100)] if values else 0.0


def means(rows: Sequence[Mapping[str, float]], digits: int = 3) -> dict[str, float]:
    """The mean of each figure."""
    return {key: round(mean([row[key] for row in rows]), digits) for key in rows[0]}
