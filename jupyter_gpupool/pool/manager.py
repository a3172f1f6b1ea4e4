"""The life of leases: who is granted what, and when it ends. docs/architecture.md has the diagram.

Every method is one transaction of the ledger; what it remembers besides (who is alive) is changed
after the commit only. So a call that raises has changed nothing, and a manager can be thrown away
and built again on the same ledger at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from . import placement
from .drained import marked, set_drained
from .errors import ImpossibleRequest, LeaseEnded, NoCapacity, UnknownLease
from .ledger import EVERY, HOLDING, LIVE, Ledger, Transaction
from .models import (
    Action,
    Change,
    Lease,
    LeaseState,
    Request,
    Server,
    Slice,
    Snapshot,
    StartWorker,
    StopWorker,
    WorkerAddress,
)
from .queueing import fair_order
from .validation import check_same

_BEATING = (LeaseState.QUEUED, LeaseState.GRANTED, LeaseState.ACTIVE)
_PRUNE_EVERY_S = 3600.0


@dataclass
class _Plan:
    """What one transaction is about to have done; acted on after its commit."""

    stops: list[Action] = field(default_factory=list)
    starts: list[Action] = field(default_factory=list)
    changed: dict[str, Lease] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Beat:
    """When a holder was last heard, on the clock that people read and on the one that measures."""

    wall: float
    monotonic: float


class Manager:
    """Decides over one ledger. Not thread-safe: one thread calls it.

    ``clock`` gives the seconds since the epoch that people read; ages are measured by ``monotonic``
    (``clock`` itself where another one is given), so that setting the clock expires nobody.
    ``ttl_s``: how long a lease or a queued request lives without a heartbeat. ``attach_timeout_s``: how
    long a granted lease may wait for its worker. ``history_s``: how long ended leases are kept.

    Heartbeats are kept in memory, not in the ledger: they cost no write, work on a full disk, and a
    manager built anew gives everybody one TTL from its own start.

    A ledger with live leases grants nothing more until :meth:`recover` has said which workers survived.
    """

    def __init__(
        self,
        ledger: Ledger,
        clock: Callable[[], float] = time.time,
        ttl_s: float = 15.0,
        *,
        attach_timeout_s: float = 60.0,
        history_s: float = 30 * 86400.0,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._monotonic = monotonic or (time.monotonic if clock is time.time else clock)
        self._ttl_s = ttl_s
        self._attach_timeout_s = attach_timeout_s
        self._history_s = history_s
        self._servers: tuple[Server, ...] = ()
        self._pruned_at: float | None = None
        self._restart_ages()
        with ledger.reading() as tx:
            self._recovered = not tx.leases(LIVE, newest=1)

    # -- what the pool consists of --------------------------------------------------------------

    def set_servers(self, servers: Sequence[Server]) -> Change:
        """The GPU servers there are now. What is granted on one that left stays so until its worker ends."""
        plan = _Plan()
        with self._ledger.transaction() as tx:
            servers = marked(tx, servers)
            tx.record_gpus(servers)
            self._grant_waiting(tx, plan, servers)
        self._servers = servers
        return self._done(plan)

    def follow(self, servers: Sequence[Server]) -> None:
        """Know those servers to answer questions about them, while another manager decides over the ledger."""
        with self._ledger.reading() as tx:
            self._servers = marked(tx, servers)
        self._recovered = True

    def drain(self, server: str, draining: bool = True) -> Change:
        """Place nothing new there from now on, or place there again; the ledger remembers. Raises UnknownServer."""
        plan = _Plan()
        with self._ledger.transaction() as tx:
            set_drained(tx, server, draining, self._clock(), self._servers)
            servers = marked(tx, self._servers)
            self._grant_waiting(tx, plan, servers)
        self._servers = servers
        return self._done(plan)

    def recover(self, adopted: Mapping[str, WorkerAddress]) -> Change:
        """Take up a ledger after a restart; ``adopted`` are the workers that still run, by lease id.

        ACTIVE without its worker becomes LOST; GRANTED gets its worker started again, or becomes
        ACTIVE with the one that was found; workers of leases that have ended are stopped.
        """
        plan = _Plan()
        with self._ledger.transaction() as tx:
            live = {lease.id: lease for lease in tx.leases(LIVE)}
            for lease in live.values():
                worker = adopted.get(lease.id)
                if lease.state is LeaseState.ACTIVE and worker is None:
                    self._end(
                        tx, plan, lease, LeaseState.LOST, "its worker did not outlive a restart of the pool"
                    )
                elif lease.state in HOLDING and worker is not None and worker != lease.worker:
                    self._activate(tx, plan, lease, worker)
                elif lease.state is LeaseState.GRANTED:
                    plan.starts.append(StartWorker(lease))
            for lease_id in adopted:
                if lease_id not in live or not live[lease_id].state.holds:
                    plan.stops.append(StopWorker(lease_id))
            self._recovered = True
            self._grant_waiting(tx, plan, self._servers)
        self._restart_ages()
        return self._done(plan)

    # -- what holders ask for -----------------------------------------------------------------

    def request(self, request: Request) -> Change:
        """Grant, queue or refuse a request. Repeating it returns the lease that it became.

        Raises InvalidRequest, ImpossibleRequest (with the reason), NoCapacity when it cannot be met
        now and would not wait, and RequestConflict when its id is taken by something else.
        """
        placement.validate(request)
        plan = _Plan()
        with self._ledger.transaction() as tx:
            lease = tx.lease(request.id)
            if lease is not None:
                check_same(lease, request)
                return Change(self._shown(tx, [lease])[0])
            lease = self._admit(tx, plan, request)
            if plan.changed[lease.id].state is LeaseState.QUEUED and not request.wait:
                raise NoCapacity(self._no_room(request))  # undoes the transaction: nothing is recorded
        self._beat(lease.id)
        return self._done(plan, lease)

    def forecast(self, request: Request) -> Lease:
        """What :meth:`request` would answer at this instant, or raise; nothing is recorded."""
        placement.validate(request)
        plan = _Plan()
        with self._ledger.rehearsal() as tx:
            self._admit(tx, plan, request)
        return self._aged(plan.changed[request.id], plan.positions)

    def heartbeat(self, lease_id: str, owner: str | None = None) -> Change:
        """The holder is alive. Raises UnknownLease, and LeaseEnded once it is over: nothing revives it."""
        with self._ledger.reading() as tx:
            lease = self._owned(tx, lease_id, owner)
            if lease.state.ended:
                raise LeaseEnded(f"lease {lease_id} has ended ({lease.state.value}): {lease.reason}")
            silence = self._silent(lease)
            if silence:  # the next tick writes it down
                raise LeaseEnded(f"lease {lease_id} has ended: {silence}")
            self._beat(lease_id)
            return Change(self._shown(tx, [lease])[0])

    def release(self, lease_id: str, owner: str | None = None, reason: str = "released") -> Change:
        """End a lease, or take a request out of the queue; an ended one is returned as it is.

        ``owner`` None is an administrator. Raises UnknownLease, also for a lease of somebody else.
        """
        plan = _Plan()
        with self._ledger.transaction() as tx:
            lease = self._owned(tx, lease_id, owner)
            if not lease.state.ended:
                queued = lease.state is LeaseState.QUEUED
                state = LeaseState.CANCELLED if queued else LeaseState.RELEASED
                self._end(tx, plan, lease, state, reason)
                self._grant_waiting(tx, plan, self._servers)
        return self._done(plan, lease)

    def resized(
        self, lease_id: str, partial: float | None, memory_mib: int | None, owner: str | None = None
    ) -> tuple[Slice, ...]:
        """What :meth:`resize` would make of the lease's slices; raises what it would raise."""
        with self._ledger.reading() as tx:
            return self._resized(tx, self._owned(tx, lease_id, owner), partial, memory_mib)

    def resize(
        self, lease_id: str, partial: float | None, memory_mib: int | None, owner: str | None = None
    ) -> Change:
        """Give an ACTIVE lease another share of the same GPUs; what is freed is granted to those who wait.

        Its worker must keep to the smaller of both shares until this has returned, see PoolService.resize.
        Raises UnknownLease, LeaseEnded, InvalidRequest, ImpossibleRequest, NoCapacity; then nothing has changed.
        """
        plan = _Plan()
        with self._ledger.transaction() as tx:
            lease = self._owned(tx, lease_id, owner)
            pieces = self._resized(tx, lease, partial, memory_mib)
            if pieces != lease.slices:
                tx.resize(lease, pieces)
                plan.changed[lease.id] = replace(lease, slices=pieces)
                self._grant_waiting(tx, plan, self._servers)
        return self._done(plan, lease)

    def _resized(
        self, tx: Transaction, lease: Lease, partial: float | None, memory_mib: int | None
    ) -> tuple[Slice, ...]:
        if lease.state.ended:
            raise LeaseEnded(f"lease {lease.id} has ended ({lease.state.value}): {lease.reason}")
        if lease.state is not LeaseState.ACTIVE:
            raise NoCapacity(f"lease {lease.id} has no slices yet that could be resized")
        return placement.resized(lease, self._servers, tx.granted_mib(), partial, memory_mib)

    # -- what engines report ------------------------------------------------------------------

    def worker_started(self, lease_id: str, worker: WorkerAddress) -> Change:
        """The worker listens: GRANTED to ACTIVE. If the lease ended meanwhile, the worker has to go."""
        plan = _Plan()
        with self._ledger.transaction() as tx:
            lease = tx.lease(lease_id)
            if lease is None or not lease.state.holds:
                plan.stops.append(StopWorker(lease_id))
            elif lease.worker != worker:
                self._activate(tx, plan, lease, worker)
        return self._done(plan, lease)

    def worker_failed(self, lease_id: str, reason: str) -> Change:
        """The worker could not be started: the lease is LOST."""
        return self.worker_exited(lease_id, LeaseState.LOST, reason)

    def worker_exited(self, lease_id: str, state: LeaseState, reason: str) -> Change:
        """The worker ended: so does its lease, in ``state``, if it has not ended before.

        Raises ValueError if a lease in ``state`` has not ended.
        """
        if not state.ended:
            raise ValueError(f"{state.value} is not an end")
        plan = _Plan()
        with self._ledger.transaction() as tx:
            lease = tx.lease(lease_id)
            if lease is not None and lease.state.holds:
                self._end(tx, plan, lease, state, reason, stop=False)
                self._grant_waiting(tx, plan, self._servers)
        return self._done(plan, lease)

    # -- what time does -----------------------------------------------------------------------

    def tick(self) -> Change:
        """End what was silent beyond its TTL, and grants whose worker never came; call it every second."""
        plan = _Plan()
        with self._ledger.reading() as tx:
            live = tx.leases(_BEATING)
        overdue = [(lease, why) for lease in live if (why := self._silent(lease) or self._workerless(lease))]
        prune = self._prune_is_due()
        if overdue or prune:
            with self._ledger.transaction() as tx:
                for lease, why in overdue:
                    queued = lease.state is LeaseState.QUEUED
                    self._end(tx, plan, lease, LeaseState.CANCELLED if queued else LeaseState.EXPIRED, why)
                if prune:
                    tx.prune(self._clock() - self._history_s)
                self._grant_waiting(tx, plan, self._servers)
        if prune:
            self._pruned_at = self._monotonic()
        return self._done(plan)

    # -- what can be seen -----------------------------------------------------------------------

    def lease(self, lease_id: str, owner: str | None = None) -> Lease:
        """Raises UnknownLease, also for a lease of somebody else than ``owner``."""
        with self._ledger.reading() as tx:
            return self._shown(tx, [self._owned(tx, lease_id, owner)])[0]

    def leases(
        self, include_ended: bool = False, owner: str | None = None, newest: int | None = None
    ) -> list[Lease]:
        """Leases in order of arrival, at most the ``newest`` so many."""
        with self._ledger.reading() as tx:
            return self._shown(tx, tx.leases(EVERY if include_ended else LIVE, owner, newest))

    def snapshot(self) -> Snapshot:
        with self._ledger.reading() as tx:
            granted = tx.granted_mib()
            live = self._shown(tx, tx.leases(LIVE))
        queue = [lease for lease in live if lease.state is LeaseState.QUEUED]
        return Snapshot(
            servers=self._servers,
            granted_mib={gpu.uuid: granted.get(gpu.uuid, 0) for s in self._servers for gpu in s.gpus},
            leases=tuple(lease for lease in live if lease.state.holds),
            queue=tuple(sorted(queue, key=lambda lease: lease.position or 0)),
        )

    # -- granting -----------------------------------------------------------------------------

    def _admit(self, tx: Transaction, plan: _Plan, request: Request) -> Lease:
        self._refuse_impossible(request)
        lease = Lease(request, LeaseState.QUEUED, created_at=self._clock(), ttl_s=self._ttl_s)
        tx.add(lease)
        plan.changed[lease.id] = lease
        self._grant_waiting(tx, plan, self._servers)
        return lease

    def _grant_waiting(self, tx: Transaction, plan: _Plan, servers: Sequence[Server]) -> None:
        """Grant what fits, in fair order. Requests behind one that does not fit in its namespace wait too."""
        queue = self._in_order(tx, servers)
        used = tx.granted_mib() if queue else {}
        stuck: set[str] = set()
        waiting: list[Lease] = []
        for lease in queue:
            slices = None
            # A silent one is as good as gone, although no tick has written it down yet.
            gone = lease.id not in plan.changed and self._silent(lease)
            if self._recovered and not gone and lease.request.namespace not in stuck:
                slices = placement.place(lease.request, servers, used)
                if slices is None and not placement.impossible(lease.request, servers):
                    stuck.add(lease.request.namespace)
                # What no server could grant (one may be away) keeps its place, but nobody waits for it.
            if slices is None:
                waiting.append(lease)
                continue
            at = self._clock()
            tx.grant(lease.id, slices, at)
            for piece in slices:
                used[piece.gpu_uuid] = used.get(piece.gpu_uuid, 0) + piece.memory_mib
            granted = replace(lease, state=LeaseState.GRANTED, slices=slices, granted_at=at)
            plan.changed[lease.id] = granted
            plan.starts.append(StartWorker(granted))
        plan.positions = _positions(waiting)

    def _in_order(self, tx: Transaction, servers: Sequence[Server]) -> list[Lease]:
        queue = tx.leases((LeaseState.QUEUED,))
        if len({lease.request.namespace for lease in queue}) < 2:
            return queue
        return fair_order(queue, tx.held_gpus(), lambda request: placement.equivalents(request, servers))

    def _refuse_impossible(self, request: Request) -> None:
        reason = placement.impossible(request, self._servers)
        if reason:
            raise ImpossibleRequest(f"this pool can never grant the request: {reason}")

    def _no_room(self, request: Request) -> str:
        if not self._recovered:
            return "the pool is just restarting; try again in a moment, or let the request wait"
        share = f"{request.memory_mib} MiB" if request.memory_mib else f"{request.partial:g} of the memory"
        count = "1 GPU" if request.num_gpus == 1 else f"{request.num_gpus} GPUs"
        return f"{count} with {share} each cannot be had now, and the request would not wait"

    # -- changes of one lease -----------------------------------------------------------------

    def _activate(self, tx: Transaction, plan: _Plan, lease: Lease, worker: WorkerAddress) -> None:
        tx.activate(lease.id, worker)
        plan.changed[lease.id] = replace(lease, state=LeaseState.ACTIVE, worker=worker)

    def _end(
        self, tx: Transaction, plan: _Plan, lease: Lease, state: LeaseState, reason: str, stop: bool = True
    ) -> None:
        now = self._clock()
        tx.end(lease, state, reason, now)
        plan.changed[lease.id] = replace(lease, state=state, reason=reason, ended_at=now)
        if stop and lease.state.holds:
            plan.stops.append(StopWorker(lease.id))

    def _owned(self, tx: Transaction, lease_id: str, owner: str | None) -> Lease:
        lease = tx.lease(lease_id)
        if lease is None or (owner is not None and lease.request.owner != owner):
            raise UnknownLease(f"there is no lease {str(lease_id)[:60]!r}, or it is not yours")
        return lease

    def _done(self, plan: _Plan, lease: Lease | None = None) -> Change:
        """After the commit: remember what has to be remembered, and say what happened."""
        now = self._monotonic()
        for changed in plan.changed.values():
            if changed.state.ended:
                self._beats.pop(changed.id, None)
                self._granted.pop(changed.id, None)
            elif changed.state is LeaseState.GRANTED:
                self._granted[changed.id] = now
        changes = tuple(self._aged(lease, plan.positions) for lease in plan.changed.values())
        if lease is not None:
            lease = self._aged(plan.changed.get(lease.id, lease), plan.positions)
        return Change(lease, tuple(plan.stops + plan.starts), changes)

    # -- who is alive ---------------------------------------------------------------------------

    def _restart_ages(self) -> None:
        self._since = _Beat(self._clock(), self._monotonic())
        self._beats: dict[str, _Beat] = {}
        self._granted: dict[str, float] = {}

    def _beat(self, lease_id: str) -> None:
        self._beats[lease_id] = _Beat(self._clock(), self._monotonic())

    def _silent(self, lease: Lease) -> str | None:
        """Why the lease is over for want of a sign of life, if it is."""
        age = self._monotonic() - self._beats.get(lease.id, self._since).monotonic
        return f"no sign of life from its holder for {lease.ttl_s:g} s" if age > lease.ttl_s else None

    def _workerless(self, lease: Lease) -> str | None:
        if lease.state is not LeaseState.GRANTED:
            return None
        age = self._monotonic() - self._granted.get(lease.id, self._since.monotonic)
        limit = self._attach_timeout_s
        return f"its worker did not come up within {limit:g} s" if age > limit else None

    def _prune_is_due(self) -> bool:
        return self._pruned_at is None or self._monotonic() - self._pruned_at > _PRUNE_EVERY_S

    # -- how leases are shown -----------------------------------------------------------------

    def _shown(self, tx: Transaction, leases: Sequence[Lease]) -> list[Lease]:
        """The ledger's leases with the last heartbeat, and the place of those that wait."""
        queued = any(lease.state is LeaseState.QUEUED for lease in leases)
        positions = _positions(self._in_order(tx, self._servers)) if queued else {}
        return [self._aged(lease, positions) for lease in leases]

    def _aged(self, lease: Lease, positions: Mapping[str, int]) -> Lease:
        if lease.state.ended:
            return lease
        beat = self._beats.get(lease.id, self._since).wall
        position = positions.get(lease.id) if lease.state is LeaseState.QUEUED else None
        return replace(lease, heartbeat_at=max(lease.created_at, beat), position=position)


def _positions(queue: Sequence[Lease]) -> dict[str, int]:
    return {lease.id: place for place, lease in enumerate(queue, start=1)}
