"""What one transaction changes of leases, and what follows from it after the commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from jupyter_gpupool.core.models import (
    Action,
    Lease,
    LeaseState,
    MoveWorker,
    Parked,
    ResumeWorker,
    Slice,
    StartWorker,
    StopWorker,
    WorkerAddress,
)

from .ledger.ledger import BufferedTransaction
from .tenancy import audit_log
from .tenancy.audit_log import Entry

#: The audit log's word for each end of a lease.
_END_ACTIONS = {
    LeaseState.RELEASED: "release",
    LeaseState.CANCELLED: "cancel",
    LeaseState.EXPIRED: "expire",
    LeaseState.LOST: "lose",
}


class PendingChange:
    """Changes leases within one transaction, and collects what to do and to notify once it is committed.

    ``clock``: seconds since the epoch.
    """

    def __init__(self, tx: BufferedTransaction, clock: Callable[[], float]) -> None:
        self.tx = tx
        self._clock = clock
        self.stops: list[Action] = []
        self.starts: list[Action] = []
        self.changed: dict[str, Lease] = {}
        self.positions: dict[str, int] = {}
        #: The limit that blocks each queued request, by lease id; None if the queue was not examined.
        self.waits_for: dict[str, str] | None = None
        self.entries: list[Entry] = []

    def add(self, lease: Lease, outcome: str) -> None:
        """Record a new request as QUEUED."""
        self.tx.add(lease)
        self.changed[lease.id] = lease
        self.note("request", lease, outcome, lease.request.owner)

    def grant(self, lease: Lease, slices: Sequence[Slice], at: float, until: float | None) -> None:
        """QUEUED to GRANTED; its worker starts after the commit."""
        self.changed[lease.id] = granted = self.tx.grant(lease.id, slices, at, until)
        self.start_worker(granted)
        self.note("grant", granted, sizes(slices))

    def activate(self, lease: Lease, worker: WorkerAddress) -> None:
        """GRANTED to ACTIVE, or ACTIVE with a worker that was found again."""
        self.changed[lease.id] = self.tx.activate(lease.id, worker)

    def park(
        self, lease: Lease, memory_mib: int, outcome: str, by_server: Mapping[str, int] | None = None
    ) -> None:
        """ACTIVE to PARKED. Its worker has let go of its GPUs already."""
        parked = Parked(memory_mib, self._clock(), by_server=dict(by_server or {}))
        self.changed[lease.id] = self.tx.park(lease, parked)
        self.note("park", lease, outcome)

    def wake(self, lease: Lease) -> None:
        """Record that the program of a parked lease waits for its GPUs."""
        self.changed[lease.id] = self.tx.wake(lease, self._clock())

    def resume(self, lease: Lease, slices: Sequence[Slice]) -> None:
        """PARKED to ACTIVE; its state is brought back after the commit."""
        woken_at = lease.parked.wanted_since if lease.parked else None
        self.changed[lease.id] = resumed = self.tx.resume(lease, slices)
        self.starts.append(ResumeWorker(resumed, woken_at))
        self.note("resume", resumed, sizes(slices))

    def begin_move(self, lease: Lease, slices: Sequence[Slice], why: str, actor: str | None = None) -> None:
        """Let a lease hold slices of another server, too; it is moved there after the commit. ``slices``: all that it
        is to have."""
        self.changed[lease.id] = moving = self.tx.begin_move(lease, slices)
        self.starts.append(MoveWorker(moving))
        self.note("move", lease, f"to {sizes(moving.arriving)}, {why}", actor)

    def end_move(self, lease: Lease, worker: WorkerAddress | None, outcome: str) -> None:
        """A lease has moved, and has that worker; None: it goes on where it was."""
        before, there = lease.leaving[0].server, lease.arriving[0].server
        self.changed[lease.id] = ended = self.tx.end_move(lease, worker)
        if worker is None:
            self.note("stay", ended, f"on {before}: {outcome}")
        else:
            self.note("moved", ended, f"from {before} to {there}, {outcome}")
            if lease.state is LeaseState.PARKED:
                self.note("resume", ended, sizes(ended.slices))

    def resize(self, lease: Lease, slices: Sequence[Slice], actor: str) -> None:
        """Give a lease other amounts of its GPUs' memory."""
        self.tx.resize(lease, slices)
        self.changed[lease.id] = replace(lease, slices=tuple(slices))
        self.note("resize", lease, sizes(slices), actor)

    def set_terms(self, lease: Lease) -> None:
        """Change when a lease expires, or who asked for it."""
        self.tx.set_terms(lease)
        self.changed[lease.id] = lease

    def end(self, lease: Lease, state: LeaseState, reason: str, stop: bool = True) -> None:
        """From a live state to an ended one. ``stop``: whether its worker, if any, is to be stopped."""
        now = self._clock()
        self.tx.end(lease, state, reason, now)
        self.changed[lease.id] = replace(
            lease, state=state, reason=reason, ended_at=now, parked=None, moving_to=()
        )
        is_requested = state in (LeaseState.RELEASED, LeaseState.CANCELLED)
        self.note(_END_ACTIONS[state], lease, reason, "" if is_requested else None)
        if stop and lease.state.has_worker:
            self.stop_worker(lease.id)

    def start_worker(self, lease: Lease) -> None:
        """Start the lease's worker after the commit."""
        self.starts.append(StartWorker(lease))

    def stop_worker(self, lease_id: str) -> None:
        """Stop a worker after the commit, before any worker starts."""
        self.stops.append(StopWorker(lease_id))

    def note(self, action: str, lease: Lease, outcome: str, actor: str | None = None) -> None:
        """Add an entry to the audit log. ``actor`` None: the pool itself."""
        who = "" if actor is None else audit_log.acting.get() or actor
        self.entries.append(Entry(self._clock(), action, lease.id, outcome, lease.request.namespace, who))


def sizes(slices: Iterable[Slice]) -> str:
    """The slices in one line, for the audit log."""
    return ", ".join(f"GPU {piece.index} of {piece.server}: {piece.memory_mib} MiB" for piece in slices)
