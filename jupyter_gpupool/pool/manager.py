"""The life of leases: who is granted what, and when it ends. docs/architecture.md has the diagram.

Every method is one transaction of the ledger; what it remembers besides (who is alive) is changed
after the commit only. So a call that raises has changed nothing, and a manager can be thrown away
and built again on the same ledger at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from . import audit, limits, placement, terms
from .audit import Entry
from .book import Book, Plan, is_limited, sizes, unknown
from .drained import marked, set_drained
from .errors import ImpossibleRequest, LeaseEnded, NoCapacity, PoolError
from .ledger import EVERY, HOLDING, LIVE, Transaction
from .models import (
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
from .namespaces import Namespaces
from .validation import check_same

_BEATING = (LeaseState.QUEUED, LeaseState.GRANTED, LeaseState.ACTIVE)
_MOST_GONE = 1000


class Manager(Book):
    """Decides over one ledger. Not thread-safe: one thread calls it.

    ``clock`` gives the seconds since the epoch that people read; ages are measured by ``monotonic``
    (``clock`` itself where another one is given), so that setting the clock expires nobody.
    ``ttl_s``: how long a lease or a queued request lives without a heartbeat. ``attach_timeout_s``: how
    long a granted lease may wait for its worker. ``history_s``: how long ended leases are kept. ``audit_s``: how long
    it is known who asked for what. Leases expire by ``clock``, which their holders read.

    Heartbeats are kept in memory, not in the ledger: they cost no write, work on a full disk, and a
    manager built anew gives everybody one TTL from its own start.

    A ledger with live leases grants nothing more until :meth:`recover` has said which workers survived.
    """

    # -- what the pool consists of --------------------------------------------------------------

    def set_servers(self, servers: Sequence[Server]) -> Change:
        """The GPU servers there are now. What is granted on one that left stays so until its worker ends."""
        with self._changing() as (tx, plan):
            servers = marked(tx, servers)
            tx.record_gpus(servers)
            self._grant_waiting(tx, plan, servers)
        self._servers = servers
        return self._done(plan)

    def follow(self, servers: Sequence[Server]) -> None:
        """Know those servers to answer questions about them, while another manager decides over the ledger."""
        with self._ledger.reading() as tx:
            self._servers = marked(tx, servers)
        self._recovered = self._follows = True

    def drain(self, server: str, draining: bool = True) -> Change:
        """Place nothing new there from now on, or place there again; the ledger remembers. Raises UnknownServer."""
        with self._changing() as (tx, plan):
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
        with self._changing() as (tx, plan):
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
        self._ages.restart()
        return self._done(plan)

    # -- what holders ask for -----------------------------------------------------------------

    def request(self, request: Request) -> Change:
        """Grant, queue or refuse a request. Repeating it returns the lease that it became.

        Raises InvalidRequest, ImpossibleRequest (with the reason), NoCapacity when it cannot be met
        now and would not wait, RequestConflict when its id is taken by something else, and UnknownNamespace.
        """
        placement.validate(request)
        try:
            with self._changing() as (tx, plan):
                lease = tx.lease(request.id)
                if lease is not None:
                    check_same(lease, request)
                    return Change(self._shown(tx, [lease])[0])
                lease = self._admit(tx, plan, request)
                if plan.changed[lease.id].state is LeaseState.QUEUED and not request.wait:
                    # Undoes the transaction: nothing is recorded.
                    raise NoCapacity(self._no_room(request, (plan.waits_for or {}).get(lease.id, "")))
        except PoolError as e:
            self.refused(request.owner, request.namespace, request.id, e)
            raise
        self._ages.beat(lease.id)
        return self._done(plan, lease)

    def forecast(self, request: Request) -> Lease:
        """What :meth:`request` would answer at this instant, or raise; nothing is recorded."""
        placement.validate(request)
        plan = Plan()
        with self._ledger.rehearsal() as tx:
            if self._follows:
                self.namespaces.read(tx)
            self._admit(tx, plan, request)
        return self._aged(plan.changed[request.id], plan.positions, plan.waits_for)

    def heartbeat(self, lease_id: str, owner: str | None = None) -> Change:
        """The holder is alive. Raises UnknownLease, and LeaseEnded once it is over: nothing revives it."""
        with self._ledger.reading() as tx:
            lease = self._owned(tx, lease_id, owner)
            if lease.state.ended:
                raise LeaseEnded(f"lease {lease_id} has ended ({lease.state.value}): {lease.reason}")
            silence = self._ages.silent(lease)
            if silence:  # the next tick writes it down
                raise LeaseEnded(f"lease {lease_id} has ended: {silence}")
            self._ages.beat(lease_id)
            return Change(self._shown(tx, [lease])[0])

    def release(self, lease_id: str, owner: str | None = None, reason: str = "released") -> Change:
        """End a lease, or take a request out of the queue; an ended one is returned as it is.

        ``owner`` None is an administrator. Raises UnknownLease, also for a lease of somebody else, unless it is in
        a namespace that ``owner`` administers.
        """
        with self._changing() as (tx, plan):
            lease = self._seen(tx, lease_id, owner)
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
        with self._changing() as (tx, plan):
            lease = self._owned(tx, lease_id, owner)
            pieces = self._resized(tx, lease, partial, memory_mib)
            if pieces != lease.slices:
                tx.resize(lease, pieces)
                plan.changed[lease.id] = replace(lease, slices=pieces)
                self._note(plan, "resize", lease, sizes(pieces), owner or "")
                self._grant_waiting(tx, plan, self._servers)
        return self._done(plan, lease)

    def _resized(
        self, tx: Transaction, lease: Lease, partial: float | None, memory_mib: int | None
    ) -> tuple[Slice, ...]:
        if lease.state.ended:
            raise LeaseEnded(f"lease {lease.id} has ended ({lease.state.value}): {lease.reason}")
        if lease.state is not LeaseState.ACTIVE:
            raise NoCapacity(f"lease {lease.id} has no slices yet that could be resized")
        pieces = placement.resized(lease, self._servers, tx.granted_mib(), partial, memory_mib)
        namespace = self.namespaces.of_lease(lease.request.namespace)
        within = limits.bounds(namespace, lease.request.owner, tx.held() if is_limited(namespace) else {})
        objection = limits.objection_to(lease.slices, pieces, within)
        if objection:
            line, never = objection
            raise (ImpossibleRequest if never else NoCapacity)(f"the lease stays as it is: {line}")
        return pieces

    def extend(self, lease_id: str, seconds: float, owner: str | None = None) -> Change:
        """More time for a lease that has an end. Raises UnknownLease, LeaseEnded, InvalidRequest, and ImpossibleRequest
        for more than its namespace allows from now on."""
        with self._changing() as (tx, plan):
            lease = self._living(self._seen(tx, lease_id, owner))
            namespace = self.namespaces.of_lease(lease.request.namespace)
            changed = terms.extended(lease, namespace, self._clock(), seconds)
            self._set_terms(tx, plan, changed)
            self._note(plan, "extend", lease, f"by {seconds:g} s", owner or "")
        return self._done(plan, lease)

    def ask(self, lease_id: str, by: str, message: str = "", owner: str | None = None) -> Change:
        """Ask a lease's holder to give it back. Raises UnknownLease where ``owner`` may not know whose it is."""
        with self._changing() as (tx, plan):
            lease = tx.lease(lease_id)
            if lease is None or not self.namespaces.sees_holder(owner, lease):
                raise unknown(lease_id)
            changed = terms.asked_back(self._living(lease), by, self._clock(), message)
            self._set_terms(tx, plan, changed)
            self._note(plan, "ask", lease, message, by)
        return self._done(plan, lease)

    def keep(self, lease_id: str, owner: str | None = None) -> Change:
        """The holder goes on: its time of computing nothing begins anew, and those who asked for it are answered."""
        with self._changing() as (tx, plan):
            lease = self._living(self._owned(tx, lease_id, owner))
            self._set_terms(tx, plan, replace(lease, asked_back=()))
            if lease.asked_back:
                self._note(plan, "keep", lease, "", owner or "")
        self._ages.computed([lease_id])
        return self._done(plan, lease)

    # -- what engines report ------------------------------------------------------------------

    def worker_started(self, lease_id: str, worker: WorkerAddress) -> Change:
        """The worker listens: GRANTED to ACTIVE. If the lease ended meanwhile, the worker has to go."""
        with self._changing() as (tx, plan):
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
        with self._changing() as (tx, plan):
            lease = tx.lease(lease_id)
            if lease is not None and lease.state.holds:
                self._end(tx, plan, lease, state, reason, stop=False)
                self._grant_waiting(tx, plan, self._servers)
        return self._done(plan, lease)

    # -- what time does -----------------------------------------------------------------------

    def computing(self, lease_ids: Iterable[str]) -> None:
        """The workers of these leases have computed something since this was last said."""
        self._ages.computed(lease_ids)

    def administer(self, change: Callable[[Namespaces, Transaction], None], entry: Entry) -> Change:
        """Change the namespaces, and grant what has become possible by it. Raises what ``change`` raises."""
        with self._changing() as (tx, plan):
            change(self.namespaces, tx)
            plan.entries.append(replace(entry, at=self._clock()))
        return self._namespaces_changed()

    def _namespaces_changed(self) -> Change:
        with self._changing() as (tx, plan):
            self.namespaces.read(tx)
            self._grant_waiting(tx, plan, self._servers)
        return self._done(plan)

    def tick(self) -> Change:
        """End what was silent beyond its TTL, grants whose worker never came, and what has been held or idle for too
        long; call it every second."""
        with self._ledger.reading(everything=True) as tx:
            changed = self.namespaces.read(tx)  # perhaps by another process
            live = tx.leases(_BEATING)
        if len(self._shown_as) > len(live) + _MOST_GONE:
            self._shown_as.clear()  # leases that somebody else has ended
        idling = {namespace.name for namespace in self.namespaces.all() if namespace.limits.idle_s is not None}
        overdue = [
            (lease, end)
            for lease, beats in zip(live, self._ages.beating(live), strict=True)
            if not beats or lease.expires_at is not None or lease.request.namespace in idling
            if (end := self._overdue(lease))
        ]
        prune = self._prune_is_due()
        if not overdue and not prune and not self._refused and not changed:
            return Change()
        refused = list(self._refused)
        with self._changing() as (tx, plan):
            plan.entries += refused
            for lease, (state, why) in overdue:
                self._end(tx, plan, lease, state, why)
            if prune:
                tx.prune(self._clock() - self._history_s)
                audit.prune(tx, self._clock() - self._audit_s)
            if overdue or changed:
                self._grant_waiting(tx, plan, self._servers)
        for _ in refused:
            self._refused.popleft()
        if prune:
            self._pruned_at = self._monotonic()
        return self._done(plan)

    def _overdue(self, lease: Lease) -> tuple[LeaseState, str] | None:
        """How and why a lease's time is over, if it is."""
        why = self._ages.silent(lease) or self._ages.workerless(lease)
        if why:
            return LeaseState.CANCELLED if lease.state is LeaseState.QUEUED else LeaseState.EXPIRED, why
        namespace = self.namespaces.of_lease(lease.request.namespace)
        if lease.state.holds and lease.expires_at is not None and lease.expires_at <= self._clock():
            return LeaseState.EXPIRED, terms.why_expired(lease, namespace)
        limit = namespace.limits.idle_s
        if limit is not None and self._ages.idle_s(lease) > limit:
            return LeaseState.RELEASED, terms.why_idle(namespace)
        return None

    # -- what can be seen -----------------------------------------------------------------------

    def lease(self, lease_id: str, owner: str | None = None) -> Lease:
        """Raises UnknownLease, also for a lease that is neither ``owner``'s nor in a namespace they administer."""
        with self._reading() as tx:
            return self._shown(tx, [self._seen(tx, lease_id, owner)])[0]

    def known(self) -> Namespaces:
        """The namespaces as they are now."""
        if self._follows:
            with self._ledger.reading() as tx:
                self.namespaces.read(tx)
        return self.namespaces

    def leases(
        self, include_ended: bool = False, owner: str | None = None, newest: int | None = None
    ) -> list[Lease]:
        """Leases in order of arrival, at most the ``newest`` so many."""
        with self._reading(everything=owner is None and not include_ended) as tx:
            states = EVERY if include_ended else LIVE
            return self._shown(tx, tx.leases(states, owner, newest, self.namespaces.managed(owner)))

    def granted(self) -> tuple[Sequence[Server], Mapping[str, int]]:
        """The servers, and what is granted now of their GPUs, in MiB by uuid."""
        with self._reading(everything=True) as tx:
            return self._servers, dict(tx.granted_mib())

    def snapshot(self) -> Snapshot:
        with self._reading(everything=True) as tx:
            granted = tx.granted_mib()
            live = self._shown(tx, tx.leases(LIVE))
        queue = [lease for lease in live if lease.state is LeaseState.QUEUED]
        return Snapshot(
            servers=self._servers,
            granted_mib={gpu.uuid: granted.get(gpu.uuid, 0) for s in self._servers for gpu in s.gpus},
            leases=tuple(lease for lease in live if lease.state.holds),
            queue=tuple(sorted(queue, key=lambda lease: lease.position or 0)),
        )
