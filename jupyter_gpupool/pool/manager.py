"""The life of leases: who is granted what, and when it ends. docs/explanation/life-of-a-lease.md has the diagram.

Every method is one transaction of the ledger. What the manager keeps in memory besides (who is alive) changes only
after the commit. So a call that raises has changed nothing, and a manager can be discarded and built again on the
same ledger at any moment.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.errors import ImpossibleRequest, LeaseEnded, NoCapacity, PoolError
from jupyter_gpupool.core.models import (
    Change,
    Lease,
    LeaseState,
    Reclaim,
    Request,
    Server,
    Slice,
    Snapshot,
    WorkerAddress,
)
from jupyter_gpupool.core.validation import check_same

from .drained_servers import marked, set_drained
from .grants import Grants, is_limited, places
from .lease_view import LeaseView, living
from .ledger.ledger import EVERY, HOLDING, LIVE, BufferedTransaction, Ledger, Transaction
from .liveness import Liveness
from .pending_change import PendingChange
from .reclaim import NO_RECLAIM, Moves, Parks, ReclaimPolicy, find_moves, find_parks, for_whom, why_parked
from .scheduling import destination, lease_terms, placement, quotas
from .scheduling.placement_index import PlacementIndex
from .scheduling.policy import FEW_SERVERS, PlacementPolicy
from .tenancy import audit_log
from .tenancy.audit_log import Entry
from .tenancy.namespaces import Namespaces
from .usage_report import LEASES_KEPT_S

#: The states in which a lease needs heartbeats.
_BEATING = (LeaseState.QUEUED, LeaseState.GRANTED, LeaseState.ACTIVE, LeaseState.PARKED)
_PRUNE_INTERVAL_S = 3600.0
#: A parked lease that could not be moved waits so many seconds before that is tried again.
_UNMOVED_S = 30.0
#: How many refusals are kept until the next tick records them.
_MAX_UNRECORDED_REFUSALS = 1000


class Manager:
    """Decides over one ledger. Not thread-safe: one thread calls it.

    ``clock``: seconds since the epoch, as people read them. Leases expire by it. ``monotonic``: measures ages, so that
    setting the clock expires no lease; default: ``clock``, if that is not the system's. ``ttl_s``: how long a lease or
    a queued request lives without a heartbeat; ``resume_s``: how long an ACTIVE lease does, if that is longer, because
    its worker notices a dead holder sooner. ``attach_timeout_s``: how long a granted lease may wait for its worker.
    ``history_s``: how long ended leases are kept. ``audit_s``: how long audit entries are kept. ``policy``: which GPUs
    a request gets among those with room. ``reclaim``: when idle leases are parked for others. ``can_move``: which
    ACTIVE leases may move for others, besides that their holders and namespaces allow it; None: none.
    ``moves_within_server``: whether to other GPUs of their own server, too.
    ``may_move``: whether a parked lease may wake at another server. ``queue_limits``: how many requests may wait.

    Heartbeats are kept in memory, not in the ledger: they cost no write, and work on a full disk. A new manager gives
    every lease one TTL from its own start.

    A ledger with live leases grants nothing until :meth:`recover` was called with the workers that survived.
    """

    def __init__(
        self,
        ledger: Ledger,
        clock: Callable[[], float] = time.time,
        ttl_s: float = 15.0,
        *,
        resume_s: float = 0.0,
        attach_timeout_s: float = 60.0,
        history_s: float = LEASES_KEPT_S,
        audit_s: float = 90 * 86400.0,
        monotonic: Callable[[], float] | None = None,
        policy: PlacementPolicy = FEW_SERVERS,
        reclaim: ReclaimPolicy = NO_RECLAIM,
        can_move: Callable[[Lease], bool] | None = None,
        moves_within_server: bool = True,
        may_move: bool = False,
        queue_limits: quotas.QueueLimits = quotas.QueueLimits(),  # noqa: B008  it cannot change
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._monotonic = monotonic or (time.monotonic if clock is time.time else clock)
        self._history_s = history_s
        self._audit_s = audit_s
        self._pruned_at: float | None = None
        self._refused: deque[Entry] = deque(maxlen=_MAX_UNRECORDED_REFUSALS)
        self._is_following = False  # another manager decides over the ledger
        self._reclaim = reclaim
        self._queue_limits = queue_limits
        self._index = PlacementIndex((), policy)
        self._asked: dict[str, int] = {}  # how often each model was asked for by name
        self._liveness = Liveness(clock, self._monotonic, attach_timeout_s, resume_s)
        self.namespaces = Namespaces()
        self._grants = Grants(self.namespaces, self._liveness, clock, ttl_s)
        self._grants.can_move = can_move
        self._grants.within_server = moves_within_server
        self._grants.may_move = may_move
        self._view = LeaseView(self.namespaces, self._liveness)
        with ledger.reading() as tx:
            self.namespaces.read(tx)
            self._asked = tx.names_asked_for()
            self._grants.are_open = not tx.leases(LIVE, newest=1)

    # -- what the pool consists of --------------------------------------------------------------

    def set_servers(self, servers: Sequence[Server]) -> Change:
        """Set the GPU servers that the pool has now. A lease on a server that left stays until its worker ends."""
        with self._changing() as change:
            servers = marked(change.tx, servers)
            change.tx.record_gpus(servers)
            index = self._new_index(servers)
            self._grants.grant_waiting(change, index)
        self._index = index
        return self._done(change)

    def _new_index(self, servers: Sequence[Server]) -> PlacementIndex:
        return PlacementIndex(servers, self._index.policy, placement.demand_by_model(self._asked, servers))

    def follow(self, servers: Sequence[Server]) -> None:
        """Answer questions about these servers, while another manager decides over the ledger."""
        with self._ledger.reading() as tx:
            self._index = self._new_index(marked(tx, servers))
        self._grants.are_open = self._is_following = True
        self._view.keeps_shown = False

    def drain(self, server: str, draining: bool = True) -> Change:
        """Place no new lease on a server, or allow it again. The ledger records it. Raises UnknownServer."""
        with self._changing() as change:
            set_drained(change.tx, server, draining, self._clock(), self._index.servers)
            index = self._new_index(marked(change.tx, self._index.servers))
            self._grants.grant_waiting(change, index)
        self._index = index
        return self._done(change)

    def recover(
        self,
        adopted: Mapping[str, WorkerAddress],
        parked: Collection[str] = (),
        arrived: Collection[str] = (),
    ) -> Change:
        """Resume a ledger after a restart. ``adopted``: the workers that still run, by lease id; ``parked``: the ids of
        those whose state is in host memory; ``arrived``: of those that were found where they were moved.

        An ACTIVE or PARKED lease without its worker becomes LOST. A GRANTED lease gets its worker started again, or
        becomes ACTIVE if its worker was found. An ACTIVE one whose worker is parked becomes PARKED. Workers of leases
        that have ended are stopped.
        """
        with self._changing() as change:
            live = {lease.id: lease for lease in change.tx.leases(LIVE)}
            for lease in live.values():
                worker = adopted.get(lease.id)
                if lease.moving_to and worker is not None:
                    is_there = lease.id in arrived
                    change.end_move(lease, worker if is_there else None, "while the pool was restarted")
                    lease = change.changed[lease.id]
                if lease.state in (LeaseState.ACTIVE, LeaseState.PARKED) and worker is None:
                    change.end(lease, LeaseState.LOST, "its worker did not outlive a restart of the pool")
                elif lease.state in HOLDING and worker is not None and worker != lease.worker:
                    change.activate(lease, worker)
                elif lease.state is LeaseState.GRANTED:
                    change.start_worker(lease)
                if lease.state is LeaseState.ACTIVE and worker is not None and lease.id in parked:
                    # The earlier pool ended between parking and recording it, or between a resume and its record.
                    change.park(change.changed.get(lease.id, lease), 0, "the pool was restarted meanwhile")
            for lease_id in adopted:
                if lease_id not in live or not live[lease_id].state.has_worker:
                    change.stop_worker(lease_id)
            self._grants.are_open = True
            self._grants.grant_waiting(change, self._index)
        self._liveness.restart()
        return self._done(change)

    # -- what holders request -----------------------------------------------------------------

    def request(self, request: Request) -> Change:
        """Grant, queue or refuse a request. Repeating it returns the lease that it became.

        Raises InvalidRequest, ImpossibleRequest (with the reason), NoCapacity if it cannot be granted now and does
        not wait, RequestConflict if its id is another request's, UnknownNamespace, and TooManyRequests if as many of
        its user or namespace wait as may.
        """
        placement.validate(request)
        try:
            with self._changing() as change:
                lease = change.tx.lease(request.id)
                if lease is not None:
                    check_same(lease, request)
                    return Change(self._shown(change.tx, [lease])[0])
                quotas.check_queue(request, change.tx.leases((LeaseState.QUEUED,)), self._queue_limits)
                lease = self._grants.admit(change, request, self._index)
                if change.changed[lease.id].state is LeaseState.QUEUED and not request.wait:
                    # Undoes the transaction: nothing is recorded.
                    raise NoCapacity(self._grants.why_not_now(request, change.waits_for))
        except PoolError as e:
            self.refused(request.owner, request.namespace, request.id, e)
            raise
        self._liveness.beat(lease.id)
        return self._done(change, lease)

    def forecast(self, request: Request) -> Lease:
        """What :meth:`request` would return or raise at this instant; nothing is recorded."""
        placement.validate(request)
        with self._ledger.rehearsal() as tx:
            change = PendingChange(tx, self._clock)
            if self._is_following:
                self.namespaces.read(tx)
            self._grants.admit(change, request, self._index)
        return self._view.shown(change.changed[request.id], change.positions, change.waits_for)

    def heartbeat(self, lease_id: str, owner: str | None = None) -> Change:
        """Record that the holder is alive. Raises UnknownLease, and LeaseEnded: nothing revives an ended lease."""
        with self._ledger.reading() as tx:
            lease = living(self._view.owned(tx, lease_id, owner))
            silence = self._liveness.silent(lease)
            if silence:  # the next tick records it
                raise LeaseEnded(f"lease {lease_id} has ended: {silence}")
            self._liveness.beat(lease_id)
            return Change(self._shown(tx, [lease])[0])

    def release(self, lease_id: str, owner: str | None = None, reason: str = "released") -> Change:
        """End a lease, or withdraw a queued request; an ended lease is returned as it is.

        ``owner`` None is the pool's administrator. Raises UnknownLease, also for another user's lease, unless it is
        in a namespace that ``owner`` administers.
        """
        with self._changing() as change:
            lease = self._view.managed(change.tx, lease_id, owner)
            if not lease.state.ended:
                queued = lease.state is LeaseState.QUEUED
                state = LeaseState.CANCELLED if queued else LeaseState.RELEASED
                change.end(lease, state, reason)
                self._grants.grant_waiting(change, self._index)
        return self._done(change, lease)

    def resized(
        self, lease_id: str, partial: float | None, memory_mib: int | None, owner: str | None = None
    ) -> tuple[Slice, ...]:
        """The slices that :meth:`resize` would give the lease; raises what it would raise."""
        with self._ledger.reading() as tx:
            return self._resized(tx, self._view.owned(tx, lease_id, owner), partial, memory_mib)

    def resize(
        self, lease_id: str, partial: float | None, memory_mib: int | None, owner: str | None = None
    ) -> Change:
        """Give an ACTIVE lease another share of the same GPUs; what is freed is granted to queued requests.

        Its worker must keep to the smaller of both shares until this returns, see PoolService.resize.
        Raises UnknownLease, LeaseEnded, InvalidRequest, ImpossibleRequest, NoCapacity; then nothing has changed.
        """
        with self._changing() as change:
            lease = self._view.owned(change.tx, lease_id, owner)
            slices = self._resized(change.tx, lease, partial, memory_mib)
            if slices != lease.slices:
                change.resize(lease, slices, owner or "")
                self._grants.grant_waiting(change, self._index)
        return self._done(change, lease)

    def _resized(
        self, tx: Transaction, lease: Lease, partial: float | None, memory_mib: int | None
    ) -> tuple[Slice, ...]:
        if living(lease).state is LeaseState.PARKED:
            raise NoCapacity(
                f"lease {lease.id} is parked; resize it once its program has used its GPUs again"
            )
        if lease.moving_to:
            raise NoCapacity(f"lease {lease.id} is being moved to another server; resize it afterwards")
        if lease.state is not LeaseState.ACTIVE:
            raise NoCapacity(f"lease {lease.id} has no slices yet; resize it once it is active")
        slices = placement.resized(lease, self._index.servers, tx.granted_mib(), partial, memory_mib)
        namespace = self.namespaces.of_lease(lease.request.namespace)
        within = quotas.bounds(namespace, lease.request.owner, tx.held() if is_limited(namespace) else {})
        objection = quotas.objection_to(lease.slices, slices, within)
        if objection:
            line, never = objection
            raise (ImpossibleRequest if never else NoCapacity)(f"the lease stays as it is: {line}")
        return slices

    def extend(self, lease_id: str, seconds: float, owner: str | None = None) -> Change:
        """Give a lease that expires more time.

        Raises UnknownLease, LeaseEnded, InvalidRequest, and ImpossibleRequest for more than its namespace allows.
        """
        with self._changing() as change:
            lease = living(self._view.managed(change.tx, lease_id, owner))
            namespace = self.namespaces.of_lease(lease.request.namespace)
            changed = lease_terms.extended(lease, namespace, self._clock(), seconds)
            change.set_terms(changed)
            change.note("extend", lease, f"by {seconds:g} s", owner or "")
        return self._done(change, lease)

    def ask(self, lease_id: str, by: str, message: str = "", owner: str | None = None) -> Change:
        """Ask a lease's holder to release it. Raises UnknownLease if ``owner`` may not see the holder."""
        with self._changing() as change:
            lease = living(self._view.visible(change.tx, lease_id, owner))
            changed = lease_terms.asked_back(lease, by, self._clock(), message)
            change.set_terms(changed)
            change.note("ask", lease, message, by)
        return self._done(change, lease)

    def keep(self, lease_id: str, owner: str | None = None) -> Change:
        """Keep a lease: restart its idle time, and clear the requests to release it."""
        with self._changing() as change:
            lease = living(self._view.owned(change.tx, lease_id, owner))
            change.set_terms(replace(lease, asked_back=()))
            if lease.asked_back:
                change.note("keep", lease, "", owner or "")
        self._liveness.computed([lease_id])
        return self._done(change, lease)

    # -- what engines report ------------------------------------------------------------------

    def worker_started(self, lease_id: str, worker: WorkerAddress) -> Change:
        """The worker listens: GRANTED to ACTIVE. If the lease has ended meanwhile, the worker is stopped."""
        with self._changing() as change:
            lease = change.tx.lease(lease_id)
            if lease is None or not lease.state.has_worker:
                change.stop_worker(lease_id)
            elif lease.worker != worker and lease.state.holds:
                change.activate(lease, worker)
        return self._done(change, lease)

    def worker_replaced(self, lease_id: str, worker: WorkerAddress, reason: str) -> Change:
        """Another worker runs on the same slices, because what the program computed ended the former one.

        ``reason``: why that one ended. If the lease has ended meanwhile, the worker is stopped.
        """
        with self._changing() as change:
            lease = change.tx.lease(lease_id)
            if lease is None or not lease.state.has_worker:
                change.stop_worker(lease_id)
            elif lease.state.holds:
                change.activate(lease, worker)
                change.note("replace", lease, reason)
        return self._done(change, lease)

    def worker_failed(self, lease_id: str, reason: str) -> Change:
        """The worker could not be started: the lease is LOST."""
        return self.worker_exited(lease_id, LeaseState.LOST, reason)

    def worker_exited(self, lease_id: str, state: LeaseState, reason: str) -> Change:
        """The worker ended: its lease ends in ``state``, unless it has ended before.

        Raises ValueError if ``state`` is a live state.
        """
        if not state.ended:
            raise ValueError(f"{state.value} is not an ended state")
        with self._changing() as change:
            lease = change.tx.lease(lease_id)
            if lease is not None and lease.state.has_worker:
                change.end(lease, state, reason, stop=False)
                self._grants.grant_waiting(change, self._index)
        return self._done(change, lease)

    # -- parking --------------------------------------------------------------------------------

    def find_parks(
        self, states: Mapping[str, WorkerState], arenas: Mapping[str, int], besides: Collection[str] = ()
    ) -> Parks | None:
        """The idle leases that are to be parked now for one that waits; None if there are none.

        ``states`` and ``arenas``: what the engine says. ``besides``: ids of leases that are left alone.
        """
        choices = {self._reclaim.default, *(namespace.reclaim for namespace in self.namespaces.all())}
        if not self._grants.are_open or Reclaim.IDLE not in choices:
            return None
        with self._ledger.reading(everything=True) as tx:
            if not isinstance(tx, BufferedTransaction):
                return None
            return find_parks(
                tx,
                self._index,
                self._grants,
                self.namespaces,
                self._liveness,
                self._reclaim,
                states,
                arenas,
                besides,
            )

    def find_moves(self) -> Moves | None:
        """The leases that are to move now for one that waits; None if there are none."""
        if not self._grants.are_open or self._grants.can_move is None:
            return None
        with self._ledger.reading(everything=True) as tx:
            return find_moves(tx, self._index, self._grants) if isinstance(tx, BufferedTransaction) else None

    def park(self, parks: Parks, kept_mib: Mapping[str, int]) -> Change:
        """Record that leases were parked, and grant their GPUs. ``kept_mib``: host memory that is kept for each, by id.

        Of a lease that has changed since :meth:`find_parks` nothing is recorded, and of none if nobody waits any more;
        the caller resumes those.
        """
        with self._changing() as change:
            waiting = change.tx.lease(parks.waiting.id)
            if waiting is not None and (waiting.state is LeaseState.QUEUED or waiting.is_woken):
                for lease in parks.leases:
                    now = change.tx.lease(lease.id)
                    is_same = (
                        now is not None
                        and now.state is LeaseState.ACTIVE
                        and now.slices == lease.slices
                        and not now.moving_to
                    )
                    if now is not None and is_same:
                        kept = kept_mib[lease.id]
                        change.park(now, kept, why_parked(now, kept, waiting), parks.by_server.get(lease.id))
                self._grants.grant_waiting(change, self._index)
        return self._done(change)

    def wake(self, lease_id: str) -> Change:
        """A parked lease's program needs its GPUs: resume it, or let it wait ahead of all requests."""
        with self._ledger.reading() as tx:
            lease = tx.lease(lease_id)
            if lease is None or lease.state is not LeaseState.PARKED or lease.is_woken or lease.moving_to:
                return Change()
        with self._changing() as change:
            lease = change.tx.lease(lease_id)
            if (
                lease is not None
                and lease.state is LeaseState.PARKED
                and not (lease.is_woken or lease.moving_to)
            ):
                change.wake(lease)
                self._grants.grant_waiting(change, self._index)
        return self._done(change)

    # -- moving ---------------------------------------------------------------------------------

    def leases_on(self, server: str) -> list[Lease]:
        """The leases of a server that may be moved elsewhere, or wait there for their workers."""
        with self._ledger.reading() as tx:
            live = tx.leases(HOLDING + (LeaseState.PARKED,))
            return [lease for lease in live if any(piece.server == server for piece in lease.slices)]

    def move(self, lease_id: str, why: str, actor: str = "", leaving: str = "") -> Change:
        """Let a lease hold slices of another server as well, to be moved there by the action of the change.

        ``leaving``: the server that it leaves; what a lease that spans servers has on others stays there. Raises
        UnknownLease, LeaseEnded, and NoCapacity with the reason why it stays where it is.
        """
        with self._changing() as change:
            lease = living(self._view.owned(change.tx, lease_id, None))
            if lease.moving_to:
                raise NoCapacity("it is being moved already")
            if lease.state not in (LeaseState.ACTIVE, LeaseState.PARKED):
                raise NoCapacity("its worker is not up yet")
            found = destination.find(lease, self._index.servers, change.tx.granted_mib(), leaving=leaving)
            if isinstance(found, str):
                raise NoCapacity(found)
            change.begin_move(lease, found, why, actor)
        return self._done(change, lease)

    def make_room(self) -> Change:
        """Let the leases that :meth:`find_moves` names be moved, by the actions of the change."""
        if self.find_moves() is None:
            return Change()
        with self._changing() as change:
            moves = find_moves(change.tx, self._index, self._grants)
            for lease in moves.leases if moves is not None else ():
                assert moves is not None
                change.begin_move(lease, moves.slices[lease.id], f"for {for_whom(lease, moves.waiting)}")
        return self._done(change)

    def moved(self, lease_id: str, worker: WorkerAddress, outcome: str = "") -> Change:
        """A lease goes on where it was moved; what it held before is granted to others."""
        with self._changing() as change:
            lease = change.tx.lease(lease_id)
            if lease is None or not lease.moving_to:
                change.stop_worker(lease_id)  # it has ended meanwhile
            else:
                change.end_move(lease, worker, outcome)
                self._grants.grant_waiting(change, self._index)
        return self._done(change, lease)

    def move_failed(self, lease_id: str, reason: str) -> Change:
        """A lease that was to be moved goes on where it was. A parked one is not moved again for a while."""
        self._grants.leave_unmoved(lease_id, _UNMOVED_S)
        with self._changing() as change:
            lease = change.tx.lease(lease_id)
            if lease is not None and lease.moving_to:
                change.end_move(lease, None, reason)
                self._grants.grant_waiting(change, self._index)
        return self._done(change, lease)

    def resume_failed(self, lease_id: str, reason: str) -> Change:
        """The state of a lease could not be brought back: the lease is LOST."""
        with self._changing() as change:
            lease = change.tx.lease(lease_id)
            if lease is not None and lease.state is LeaseState.ACTIVE:
                change.end(lease, LeaseState.LOST, reason)
                self._grants.grant_waiting(change, self._index)
        return self._done(change)

    # -- what time does -----------------------------------------------------------------------

    def computing(self, lease_ids: Iterable[str]) -> None:
        """Record that the workers of these leases have computed something since the last call."""
        self._liveness.computed(lease_ids)

    def administer(self, edit: Callable[[Namespaces, Transaction], None], entry: Entry) -> Change:
        """Change the namespaces, and grant what becomes possible by it. Raises what ``edit`` raises."""
        with self._changing() as change:
            edit(self.namespaces, change.tx)
            change.entries.append(replace(entry, at=self._clock()))
        return self._namespaces_changed()

    def _namespaces_changed(self) -> Change:
        with self._changing() as change:
            self.namespaces.read(change.tx)
            self._grants.grant_waiting(change, self._index)
        return self._done(change)

    def tick(self) -> Change:
        """End leases whose holder was silent beyond the TTL, whose worker did not come up, or which were held or idle
        for too long. Call it every second."""
        with self._ledger.reading(everything=True) as tx:
            has_new_namespaces = self.namespaces.read(tx)  # another process may have changed them
            live = tx.leases(_BEATING)
        self._view.forget_stale(len(live))
        idling = {
            namespace.name for namespace in self.namespaces.all() if namespace.limits.idle_s is not None
        }
        overdue = [
            (lease, end)
            for lease, beats in zip(live, self._liveness.beating(live), strict=True)
            if not beats or lease.expires_at is not None or lease.request.namespace in idling
            if (end := self._overdue(lease))
        ]
        prune = self._is_prune_due()
        retries = self._grants.forget_unmoved()
        if not overdue and not prune and not self._refused and not has_new_namespaces and not retries:
            return Change()
        refused = list(self._refused)
        with self._changing() as change:
            change.entries += refused
            for lease, (state, why) in overdue:
                change.end(lease, state, why)
            if prune:
                change.tx.prune(self._clock() - self._history_s)
                audit_log.prune(change.tx, self._clock() - self._audit_s)
                self._asked = change.tx.names_asked_for()
            if overdue or has_new_namespaces or retries:
                self._grants.grant_waiting(change, self._index)
        for _ in refused:
            self._refused.popleft()
        if prune:
            self._pruned_at = self._monotonic()
            if placement.demand_by_model(self._asked, self._index.servers) != self._index.demand:
                self._index = self._new_index(self._index.servers)
        return self._done(change)

    def _overdue(self, lease: Lease) -> tuple[LeaseState, str] | None:
        """The state in which a lease is to end now, and why; None if it goes on."""
        why = self._liveness.silent(lease) or self._liveness.workerless(lease)
        if why:
            return LeaseState.CANCELLED if lease.state is LeaseState.QUEUED else LeaseState.EXPIRED, why
        namespace = self.namespaces.of_lease(lease.request.namespace)
        if lease.state.has_worker and lease.expires_at is not None and lease.expires_at <= self._clock():
            return LeaseState.EXPIRED, lease_terms.why_expired(lease, namespace)
        limit = namespace.limits.idle_s
        if limit is not None and self._liveness.idle_s(lease) > limit:
            return LeaseState.RELEASED, lease_terms.why_idle(namespace)
        return None

    # -- what is shown --------------------------------------------------------------------------

    def lease(self, lease_id: str, owner: str | None = None) -> Lease:
        """One lease. Raises UnknownLease, also if it is neither ``owner``'s nor in a namespace that they administer."""
        with self._reading() as tx:
            return self._shown(tx, [self._view.managed(tx, lease_id, owner)])[0]

    def known(self) -> Namespaces:
        """The namespaces as they are now."""
        if self._is_following:
            with self._ledger.reading() as tx:
                self.namespaces.read(tx)
        return self.namespaces

    def leases(
        self, include_ended: bool = False, owner: str | None = None, newest: int | None = None
    ) -> list[Lease]:
        """Leases in order of arrival, at most the ``newest``."""
        with self._reading(everything=owner is None and not include_ended) as tx:
            states = EVERY if include_ended else LIVE
            return self._shown(tx, tx.leases(states, owner, newest, self.namespaces.managed(owner)))

    def granted(self) -> tuple[Sequence[Server], Mapping[str, int]]:
        """The servers, and the MiB granted now of each GPU, by uuid."""
        with self._reading(everything=True) as tx:
            return self._index.servers, dict(tx.granted_mib())

    def snapshot(self) -> Snapshot:
        """The servers, what is granted of them, the leases that hold slices, and the queue in its order."""
        with self._reading(everything=True) as tx:
            granted = tx.granted_mib()
            live = self._shown(tx, tx.leases(LIVE))
        queue = [lease for lease in live if lease.state is LeaseState.QUEUED or lease.is_woken]
        return Snapshot(
            servers=tuple(self._index.servers),
            granted_mib={gpu.uuid: granted.get(gpu.uuid, 0) for s in self._index.servers for gpu in s.gpus},
            leases=tuple(lease for lease in live if lease.state.holds),
            queue=tuple(sorted(queue, key=lambda lease: lease.position or 0)),
            parked=tuple(lease for lease in live if lease.state is LeaseState.PARKED and not lease.is_woken),
        )

    # -- transactions ---------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[PendingChange]:
        """A writing transaction; its audit entries are written with it."""
        with self._ledger.transaction() as tx:
            change = PendingChange(tx, self._clock)
            yield change
            audit_log.write(tx, change.entries)

    @contextmanager
    def _reading(self, everything: bool = False) -> Iterator[Transaction]:
        """A reading transaction, with the namespaces as the deciding manager has left them."""
        with self._ledger.reading(everything) as tx:
            if self._is_following:
                self.namespaces.read(tx)
            yield tx

    def _done(self, change: PendingChange, lease: Lease | None = None) -> Change:
        """After the commit: update what is kept in memory, and return what happened."""
        self._view.update(change)
        for changed in change.changed.values():
            self._liveness.changed(changed)
        changes = tuple(self._view.shown(lease, change.positions) for lease in change.changed.values())
        if lease is not None:
            lease = self._view.shown(change.changed.get(lease.id, lease), change.positions)
        positions = None if change.waits_for is None else change.positions
        return Change(lease, tuple(change.stops + change.starts), changes, positions)

    def _shown(self, tx: Transaction, leases: Sequence[Lease]) -> list[Lease]:
        """The ledger's leases as they are shown."""
        does_any_wait = any(lease.state is LeaseState.QUEUED or lease.is_woken for lease in leases)
        positions = places(self._grants.waiting(tx, self._index.servers)) if does_any_wait else {}
        return [self._view.shown(lease, positions) for lease in leases]

    def refused(self, owner: str, namespace: str, subject: str, error: PoolError) -> None:
        """Record that a request was refused; the next tick writes it to the audit log."""
        who = audit_log.acting.get() or owner
        self._refused.append(Entry(self._clock(), "refuse", subject, str(error), namespace[:63], who))

    def _is_prune_due(self) -> bool:
        return self._pruned_at is None or self._monotonic() - self._pruned_at > _PRUNE_INTERVAL_S
