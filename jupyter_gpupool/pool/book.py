"""What every call of the manager is made of: one transaction, who is granted what by it, and how leases are shown."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from . import audit, limits, placement
from .ages import Ages
from .audit import Entry
from .errors import ImpossibleRequest, LeaseEnded, PoolError, UnknownLease
from .granting import decide
from .ledger import LIVE, Ledger, Transaction, Viewed
from .models import (
    Action,
    Change,
    Lease,
    LeaseState,
    Namespace,
    Request,
    Server,
    Slice,
    StartWorker,
    StopWorker,
    WorkerAddress,
)
from .namespaces import Namespaces
from .queueing import fair_order
from .spans import span

_PRUNE_EVERY_S = 3600.0
#: How many refusals are remembered until the next tick writes them down.
_MOST_REFUSALS = 1000
#: The end of a lease as the audit trail calls it.
_ENDS = {
    LeaseState.RELEASED: "release",
    LeaseState.CANCELLED: "cancel",
    LeaseState.EXPIRED: "expire",
    LeaseState.LOST: "lose",
}


@dataclass
class Plan:
    """What one transaction is about to have done; acted on after its commit."""

    stops: list[Action] = field(default_factory=list)
    starts: list[Action] = field(default_factory=list)
    changed: dict[str, Lease] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    waits_for: dict[str, str] | None = None  # None: who waits for what has not been looked at
    entries: list[Entry] = field(default_factory=list)


class Book:
    """One ledger, and what is remembered beside it; :class:`~.manager.Manager` says what is done with them."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Callable[[], float] = time.time,
        ttl_s: float = 15.0,
        *,
        attach_timeout_s: float = 60.0,
        history_s: float = 30 * 86400.0,
        audit_s: float = 90 * 86400.0,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._monotonic = monotonic or (time.monotonic if clock is time.time else clock)
        self._ttl_s = ttl_s
        self._history_s = history_s
        self._audit_s = audit_s
        self._servers: tuple[Server, ...] = ()
        self._pruned_at: float | None = None
        self._ages = Ages(clock, self._monotonic, attach_timeout_s)
        self._waits_for: Mapping[str, str] = {}
        self._refused: deque[Entry] = deque(maxlen=_MOST_REFUSALS)
        self._shown_as: dict[str, tuple[Lease, Lease]] = {}  # the ledger's lease, and how it was shown last
        self.namespaces = Namespaces()
        self._follows = False  # another manager decides over the ledger
        with ledger.reading() as tx:
            self.namespaces.read(tx)
            self._recovered = not tx.leases(LIVE, newest=1)

    # -- granting -----------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[tuple[Viewed, Plan]]:
        """A transaction, and what follows from it; what it is to be known for is written with it."""
        plan = Plan()
        with self._ledger.transaction() as tx:
            yield tx, plan
            audit.write(tx, plan.entries)

    @contextmanager
    def _reading(self, everything: bool = False) -> Iterator[Transaction]:
        """A transaction that only looks, at namespaces that another manager may have changed."""
        with self._ledger.reading(everything) as tx:
            if self._follows:
                self.namespaces.read(tx)
            yield tx

    def _admit(self, tx: Viewed, plan: Plan, request: Request) -> Lease:
        namespace = self.namespaces.of_request(request.namespace)
        reason = limits.impossible(request, self._servers, namespace, request.owner)
        if reason:
            raise ImpossibleRequest(reason)
        lease = Lease(request, LeaseState.QUEUED, created_at=self._clock(), ttl_s=self._ttl_s)
        tx.add(lease)
        plan.changed[lease.id] = lease
        self._note(plan, "request", lease, wanted(request), request.owner)
        with span("placement"):
            self._grant_waiting(tx, plan, self._servers)
        return lease

    def _grant_waiting(self, tx: Viewed, plan: Plan, servers: Sequence[Server]) -> None:
        """Grant what fits, in fair order. Requests behind one that does not fit in its namespace wait too."""
        queue = self._in_order(tx, servers)
        if not queue or not self._recovered:
            plan.positions, plan.waits_for = places(queue), {}
            return
        limited = any(is_limited(self.namespaces.of_lease(lease.request.namespace)) for lease in queue)
        decision = decide(
            queue,
            servers,
            tx.granted_mib(),
            tx.held() if limited else {},
            self.namespaces.of_lease,
            # A silent one is as good as gone, although no tick has written it down yet.
            lambda lease: lease.id not in plan.changed and self._ages.silent(lease) is not None,
        )
        at = self._clock()
        for lease, slices in decision.granted:
            longest = self.namespaces.of_lease(lease.request.namespace).limits.lease_s
            until = None if longest is None else at + longest
            plan.changed[lease.id] = granted = tx.grant(lease.id, slices, at, until)
            plan.starts.append(StartWorker(granted))
            self._note(plan, "grant", granted, sizes(slices))
        plan.positions, plan.waits_for = places(decision.waiting), decision.waits_for

    def _in_order(self, tx: Transaction, servers: Sequence[Server]) -> list[Lease]:
        queue = tx.leases((LeaseState.QUEUED,))
        if len({lease.request.namespace for lease in queue}) < 2:
            return queue
        held: dict[str, float] = {}
        for (name, _), holding in tx.held().items():
            held[name] = held.get(name, 0.0) + holding.gpus
        weights = self.namespaces.weights()
        return fair_order(queue, held, lambda request: placement.equivalents(request, servers), weights)

    def _no_room(self, request: Request, limit: str) -> str:
        if not self._recovered:
            return "the pool is just restarting; try again in a moment, or let the request wait"
        why = f": {limit}" if limit else ""
        return f"{wanted(request)} cannot be had now, and the request would not wait{why}"

    # -- changes of one lease -----------------------------------------------------------------

    def _activate(self, tx: Viewed, plan: Plan, lease: Lease, worker: WorkerAddress) -> None:
        plan.changed[lease.id] = tx.activate(lease.id, worker)

    def _end(
        self, tx: Viewed, plan: Plan, lease: Lease, state: LeaseState, reason: str, stop: bool = True
    ) -> None:
        now = self._clock()
        tx.end(lease, state, reason, now)
        plan.changed[lease.id] = replace(lease, state=state, reason=reason, ended_at=now)
        asked = state in (LeaseState.RELEASED, LeaseState.CANCELLED)
        self._note(plan, _ENDS[state], lease, reason, "" if asked else None)
        if stop and lease.state.holds:
            plan.stops.append(StopWorker(lease.id))

    def _owned(self, tx: Transaction, lease_id: str, owner: str | None) -> Lease:
        lease = tx.lease(lease_id)
        if lease is None or owner not in (None, lease.request.owner):
            raise unknown(lease_id)
        return lease

    def _seen(self, tx: Transaction, lease_id: str, owner: str | None) -> Lease:
        """A lease that ``owner`` holds, or whose namespace they administer."""
        lease = tx.lease(lease_id)
        if lease is None or not self.namespaces.manages(owner, lease):
            raise unknown(lease_id)
        return lease

    def _living(self, lease: Lease) -> Lease:
        if lease.state.ended:
            raise LeaseEnded(f"lease {lease.id} has ended ({lease.state.value}): {lease.reason}")
        return lease

    def _set_terms(self, tx: Viewed, plan: Plan, lease: Lease) -> None:
        tx.set_terms(lease)
        plan.changed[lease.id] = lease

    def _note(self, plan: Plan, action: str, lease: Lease, outcome: str, actor: str | None = None) -> None:
        """For the audit trail; ``actor`` None: the pool by itself."""
        who = "" if actor is None else audit.acting.get() or actor
        plan.entries.append(Entry(self._clock(), action, lease.id, outcome, lease.request.namespace, who))

    def refused(self, owner: str, namespace: str, subject: str, error: PoolError) -> None:
        """Somebody was refused what they asked for; the next tick writes it down."""
        who = audit.acting.get() or owner
        self._refused.append(Entry(self._clock(), "refuse", subject, str(error), namespace[:63], who))

    def _done(self, plan: Plan, lease: Lease | None = None) -> Change:
        """After the commit: remember what has to be remembered, and say what happened."""
        if plan.waits_for is not None:
            self._waits_for = plan.waits_for
        for changed in plan.changed.values():
            self._ages.changed(changed)
            self._shown_as.pop(changed.id, None)
        changes = tuple(self._aged(lease, plan.positions) for lease in plan.changed.values())
        if lease is not None:
            lease = self._aged(plan.changed.get(lease.id, lease), plan.positions)
        positions = None if plan.waits_for is None else plan.positions
        return Change(lease, tuple(plan.stops + plan.starts), changes, positions)

    def _prune_is_due(self) -> bool:
        return self._pruned_at is None or self._monotonic() - self._pruned_at > _PRUNE_EVERY_S

    # -- how leases are shown -----------------------------------------------------------------

    def _shown(self, tx: Transaction, leases: Sequence[Lease]) -> list[Lease]:
        """The ledger's leases with the last heartbeat, and the place of those that wait."""
        queued = any(lease.state is LeaseState.QUEUED for lease in leases)
        at = places(self._in_order(tx, self._servers)) if queued else {}
        return [self._aged(lease, at) for lease in leases]

    def _aged(
        self, lease: Lease, positions: Mapping[str, int], waits_for: Mapping[str, str] | None = None
    ) -> Lease:
        if lease.state.ended:
            return lease
        heard = max(lease.created_at, self._ages.heard(lease).wall)
        if lease.state is LeaseState.QUEUED:
            limit = (self._waits_for if waits_for is None else waits_for).get(lease.id, "")
            return replace(lease, heartbeat_at=heard, position=positions.get(lease.id), waits_for=limit)
        idle_s = self.namespaces.of_lease(lease.request.namespace).limits.idle_s
        idle_since = self._ages.idle_since(lease, idle_s)
        known, shown = self._shown_as.get(lease.id, (None, lease))
        if known is lease and (shown.heartbeat_at, shown.idle_since) == (heard, idle_since):
            return shown  # the very same, so that who compares thousands of them is done at once
        shown = replace(lease, heartbeat_at=heard, idle_since=idle_since)
        if not self._follows:  # who follows has every lease from the database, never the same twice
            self._shown_as[lease.id] = (lease, shown)
        return shown


def places(queue: Sequence[Lease]) -> dict[str, int]:
    return {lease.id: place for place, lease in enumerate(queue, start=1)}


def unknown(lease_id: object) -> UnknownLease:
    return UnknownLease(f"there is no lease {str(lease_id)[:60]!r}, or it is not yours")


def is_limited(namespace: Namespace) -> bool:
    most = namespace.limits
    return (most.memory_mib, most.gpus, most.leases) != (None, None, None)


def wanted(request: Request) -> str:
    share = f"{request.memory_mib} MiB" if request.memory_mib else f"{request.partial:g} of the memory"
    return f"{'1 GPU' if request.num_gpus == 1 else f'{request.num_gpus} GPUs'} with {share} each"


def sizes(pieces: Iterable[Slice]) -> str:
    return ", ".join(f"GPU {piece.index} of {piece.server}: {piece.memory_mib} MiB" for piece in pieces)
