"""Grants: admit requests, order the queue, and grant what fits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from jupyter_gpupool.core.errors import ImpossibleRequest
from jupyter_gpupool.core.models import GPU, Lease, LeaseState, Namespace, Reclaim, Request, Server, Slice
from jupyter_gpupool.core.tracing import span

from .ledger.ledger import BufferedTransaction, Transaction
from .liveness import Liveness
from .pending_change import PendingChange
from .scheduling import destination, placement, quotas, resumption
from .scheduling.admission import GrantPlan, plan_grants
from .scheduling.fair_queue import fair_order
from .scheduling.placement_index import Granted, PlacementIndex, trial_grants
from .scheduling.relocation import has_one_shape
from .scheduling.reservation import LeasesOn, Movable, Reservation, Share
from .tenancy.namespaces import Namespaces


@dataclass(frozen=True)
class Head:
    """The first of those that wait for memory. ``groups``: GPUs that may serve it together, each with the MiB that it
    takes there."""

    lease: Lease
    groups: Sequence[Sequence[tuple[GPU, int]]]


class Grants:
    """Decides which requests are granted, and records it in a :class:`~.pending_change.PendingChange`.

    ``are_open``: False until it is known which workers survived a restart; then nothing is granted. ``can_move``: which
    leases may move for those that wait, besides that they must be ACTIVE; None: none. ``within_server``: whether
    they may move to other GPUs of their own server.
    """

    def __init__(
        self, namespaces: Namespaces, liveness: Liveness, clock: Callable[[], float], ttl_s: float
    ) -> None:
        self._namespaces = namespaces
        self._liveness = liveness
        self._clock = clock
        self._ttl_s = ttl_s
        self.are_open = False
        self.can_move: Callable[[Lease], bool] | None = None
        self.within_server = True
        #: whether a parked lease may wake at another server
        self.may_move = False
        self._unmoved_until: dict[str, float] = {}  # by the clock, of leases that could not be moved

    def admit(self, change: PendingChange, request: Request, index: PlacementIndex) -> Lease:
        """Queue a new request, and grant it if it fits now. Raises ImpossibleRequest and UnknownNamespace."""
        namespace = self._namespaces.of_request(request.namespace)
        reason = quotas.impossible(request, index, namespace, request.owner)
        if reason:
            raise ImpossibleRequest(reason)
        lease = Lease(request, LeaseState.QUEUED, created_at=self._clock(), ttl_s=self._ttl_s)
        change.add(lease, wanted(request))
        with span("placement"):
            self.grant_waiting(change, index)
        return lease

    def grant_waiting(self, change: PendingChange, index: PlacementIndex) -> None:
        """Resume and grant what fits: woken leases first, then requests in fair order. Behind one that does not fit,
        grant only what it does not need."""
        with trial_grants(change.tx.granted_mib()) as room:
            woken = self._resume_woken(change, index, room)
            while True:
                queue = self.queue(change.tx, index.servers)
                # The next tick cancels a request whose holder is silent; until then it must not be granted.
                plan = (
                    self._plan(
                        change.tx,
                        queue,
                        index,
                        room,
                        lambda lease: lease.id not in change.changed and self._is_silent(lease),
                    )
                    if self.are_open
                    else GrantPlan(waiting=queue)
                )
                at = self._clock()
                for lease, slices in plan.granted:
                    longest = self._namespaces.of_lease(lease.request.namespace).limits.lease_s
                    change.grant(lease, slices, at, None if longest is None else at + longest)
                # A grant may have made it another namespace's turn, and what was kept from that one is then its own.
                if not plan.granted or len({lease.request.namespace for lease in plan.waiting}) < 2:
                    break
        change.positions, change.waits_for = places([*woken, *plan.waiting]), plan.waits_for

    def _resume_woken(self, change: PendingChange, index: PlacementIndex, room: Granted) -> list[Lease]:
        """Resume what fits of the woken leases. Return the others; what is free where they need it is kept for them."""
        waiting = change.tx.woken()
        if not self.are_open:
            return waiting
        for lease in list(waiting):
            if self._is_silent(lease):
                continue
            slices = resumption.place(lease, index.servers, room)
            if slices is not None:
                change.resume(lease, slices)
                waiting.remove(lease)
                continue
            elsewhere = self._elsewhere(lease, index, room)
            if elsewhere is not None:
                change.begin_move(lease, elsewhere, "where its program can go on")
                waiting.remove(lease)
            else:
                self._keep_for_woken(lease, index, room, change.tx.leases_on)
        return waiting

    def _elsewhere(self, lease: Lease, index: PlacementIndex, room: Granted) -> tuple[Slice, ...] | None:
        """The slices of another server on which a woken lease may go on; None if there are none."""
        if not self.may_move or lease.id in self._unmoved_until:
            return None
        found = destination.find(lease, index.servers, room)
        return None if isinstance(found, str) else found

    def leave_unmoved(self, lease_id: str, seconds: float) -> None:
        """Do not try to move a lease for that long."""
        self._unmoved_until[lease_id] = self._clock() + seconds

    def forget_unmoved(self) -> bool:
        """Allow leases to be moved again that were left alone for long enough. Return whether there are any."""
        now = self._clock()
        over = [lease_id for lease_id, until in self._unmoved_until.items() if until <= now]
        for lease_id in over:
            del self._unmoved_until[lease_id]
        return bool(over)

    def _keep_for_woken(
        self, lease: Lease, index: PlacementIndex, room: Granted, leases_on: LeasesOn
    ) -> None:
        for uuid, mib in resumption.keep(lease, index.servers, room, leases_on).items():
            if mib:
                room.use_on_trial(uuid, mib)

    def _plan(
        self,
        tx: BufferedTransaction,
        queue: Sequence[Lease],
        index: PlacementIndex,
        room: Granted,
        gone: Callable[[Lease], bool],
        leases_on: LeasesOn | None = None,
    ) -> GrantPlan:
        if not queue:
            return GrantPlan()
        limited = any(is_limited(self._namespaces.of_lease(lease.request.namespace)) for lease in queue)
        held = tx.held() if limited else {}
        return plan_grants(
            queue,
            index,
            room,
            held,
            self._namespaces.of_lease,
            gone,
            leases_on or tx.leases_on,
            self._movable(tx),
        )

    def _movable(self, tx: BufferedTransaction) -> Movable | None:
        can_move = self.can_move
        if can_move is None:
            return None

        def movable(lease_id: str) -> Lease | None:
            lease = tx.live.leases.get(lease_id)
            if lease is None or lease.state is not LeaseState.ACTIVE:
                return None
            if lease.moving_to:
                return lease
            is_allowed = (
                not lease.request.never_park
                and self._namespaces.of_lease(lease.request.namespace).reclaim is not Reclaim.NEVER
                and lease_id not in self._unmoved_until
            )
            return lease if is_allowed and has_one_shape(lease) and can_move(lease) else None

        return Movable(movable, self.within_server)

    def _is_silent(self, lease: Lease) -> bool:
        return self._liveness.silent(lease) is not None

    def reservations(self, tx: BufferedTransaction, index: PlacementIndex) -> list[tuple[Lease, Reservation]]:
        """The first requests of each namespace that wait for memory, with what is kept for them."""
        with trial_grants(tx.granted_mib()) as room:
            for lease in tx.woken():
                if not self._is_silent(lease):
                    self._keep_for_woken(lease, index, room, tx.leases_on)
            queue = self.queue(tx, index.servers)
            reserved = self._plan(tx, queue, index, room, self._is_silent).reserved
        return [(lease, reserved[lease.id]) for lease in queue if lease.id in reserved]

    def heads(
        self, tx: BufferedTransaction, index: PlacementIndex
    ) -> Generator[tuple[Head, Mapping[str, int]], None, None]:
        """Those that wait for memory and are next: woken leases, then the first request of each namespace.

        With each comes what is granted by GPU uuid, including what is kept for those before it; it is true until the
        next one is asked for.
        """
        with trial_grants(tx.granted_mib()) as room:
            for lease in tx.woken():
                if not self._is_silent(lease):
                    groups = [resumption.group(lease, index.servers)]
                    if self.may_move and lease.id not in self._unmoved_until:
                        groups += destination.groups(lease, index.servers)
                    yield Head(lease, groups), room
                    self._keep_for_woken(lease, index, room, tx.leases_on)
            queue = self.queue(tx, index.servers)
            plan = self._plan(tx, queue, index, room, self._is_silent)
            held = tx.held()
            for lease in queue:
                reservation = plan.reserved.get(lease.id)
                if reservation is None:
                    continue
                request = lease.request
                bounds = quotas.bounds(self._namespaces.of_lease(request.namespace), request.owner, held)
                servers = quotas.within_limits(request, index.servers, bounds)
                groups = [placement.eligible(request, server) for server in servers]
                if request.spread:
                    groups = [[entry for group in groups for entry in group]]
                yield Head(lease, groups), room
                # All that it will hold, and not only what is free of that now: who makes room there for a later one
                # makes it for this one first.
                kept = {**reservation.blocked_mib, **{p.gpu_uuid: p.memory_mib for p in reservation.slices}}
                for uuid, mib in kept.items():
                    if mib:
                        room.use_on_trial(uuid, mib)

    def starts_without(
        self, tx: BufferedTransaction, index: PlacementIndex, waiting: Lease, parked: Sequence[Lease]
    ) -> bool:
        """Whether one that waits gets what these leases leave if they are parked now, and not one that is before it."""
        gone = {lease.id for lease in parked}

        def leases_on(uuid: str) -> Mapping[str, Share]:
            return {lease_id: share for lease_id, share in tx.leases_on(uuid).items() if lease_id not in gone}

        with trial_grants(tx.granted_mib()) as room:
            for lease in parked:
                for piece in lease.slices:
                    room.use_on_trial(piece.gpu_uuid, -piece.memory_mib)
            for lease in tx.woken():
                if self._is_silent(lease):
                    continue
                slices = resumption.place(lease, index.servers, room) or self._elsewhere(lease, index, room)
                if lease.id == waiting.id:
                    return slices is not None
                if slices is None:
                    self._keep_for_woken(lease, index, room, leases_on)
                for piece in slices or ():
                    room.use_on_trial(piece.gpu_uuid, piece.memory_mib)
            queue = self.queue(tx, index.servers)
            plan = self._plan(tx, queue, index, room, self._is_silent, leases_on)
        return any(lease.id == waiting.id for lease, _ in plan.granted)

    def waiting(self, tx: Transaction, servers: Sequence[Server]) -> list[Lease]:
        """The leases that wait, in the order in which they resume or are granted."""
        return [*tx.woken(), *self.queue(tx, servers)]

    def queue(self, tx: Transaction, servers: Sequence[Server]) -> list[Lease]:
        """The queued leases, in the order in which they are granted."""
        queue = tx.leases((LeaseState.QUEUED,))
        if len({lease.request.namespace for lease in queue}) < 2:
            return queue
        held: dict[str, float] = {}
        for (name, _), holding in tx.held().items():
            held[name] = held.get(name, 0.0) + holding.gpus
        weights = self._namespaces.weights()
        return fair_order(queue, held, lambda request: placement.equivalents(request, servers), weights)

    def why_not_now(self, request: Request, waits_for: Mapping[str, str] | None) -> str:
        """Why a request that does not wait is refused. ``waits_for``: the blocking limits, by lease id."""
        if not self.are_open:
            return "the pool is restarting; try again in a moment, or let the request wait"
        limit = (waits_for or {}).get(request.id, "")
        why = f": {limit}" if limit else ""
        return f"{wanted(request)} cannot be granted now, and the request does not wait{why}"


def places(queue: Sequence[Lease]) -> dict[str, int]:
    """The position of each queued lease, from 1."""
    return {lease.id: place for place, lease in enumerate(queue, start=1)}


def is_limited(namespace: Namespace) -> bool:
    """Whether the namespace limits what its leases hold together."""
    limits = namespace.limits
    return (limits.memory_mib, limits.gpus, limits.leases) != (None, None, None)


def wanted(request: Request) -> str:
    """The request in words: ``2 GPUs with 0.5 of the memory each``."""
    share = f"{request.memory_mib} MiB" if request.memory_mib else f"{request.partial:g} of the memory"
    return f"{'1 GPU' if request.num_gpus == 1 else f'{request.num_gpus} GPUs'} with {share} each"
