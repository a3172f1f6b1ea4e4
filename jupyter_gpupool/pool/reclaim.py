"""Finds how to make room for the one that waits first: idle leases to park, as policies allow it, or leases to move."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.models import Lease, LeaseState, Reclaim, Request, Slice

from .grants import Grants
from .ledger.ledger import BufferedTransaction
from .liveness import Liveness
from .scheduling import placement, planner
from .scheduling.placement_index import PlacementIndex
from .tenancy.namespaces import Namespaces

#: For how many of those that wait a plan is looked for that has to be given up: each takes a look at all of them.
MAX_IN_VAIN = 8


@dataclass(frozen=True)
class ReclaimPolicy:
    """When a lease may be parked for somebody who waits.

    ``default``: of the namespaces that choose nothing. ``after_s``: how long a lease must have been idle, unless its
    namespace has a time of its own;
    ``min_resident_s``: how long it keeps its GPUs at least, once it has them. Both in seconds. ``oversubscribe``: how
    many times the pool's GPUs all leases may hold together, those that are parked included.
    """

    default: Reclaim = Reclaim.NEVER
    after_s: float = 300.0
    min_resident_s: float = 60.0
    oversubscribe: float = 2.0


NO_RECLAIM = ReclaimPolicy()


@dataclass(frozen=True)
class Parks:
    """The leases to park, and the one that waits for their GPUs. ``by_server``: the MiB of each server's host memory
    that a lease takes which spans servers, by its id."""

    leases: tuple[Lease, ...]
    waiting: Lease
    by_server: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Moves:
    """The leases to move, their new slices by lease id, and the one that waits for what they leave."""

    leases: tuple[Lease, ...]
    slices: Mapping[str, tuple[Slice, ...]]
    waiting: Lease


def find_moves(tx: BufferedTransaction, index: PlacementIndex, grants: Grants) -> Moves | None:
    """The fewest moves that make room for one that waits; None if nobody waits, or moves alone do not help."""
    for waiting, reservation in grants.reservations(tx, index):
        if reservation.moves and not reservation.waits_for:
            leases = tuple(tx.live.leases[lease_id] for lease_id in reservation.moves)
            return Moves(leases, reservation.moves, waiting)
    return None


def find_parks(
    tx: BufferedTransaction,
    index: PlacementIndex,
    grants: Grants,
    namespaces: Namespaces,
    liveness: Liveness,
    policy: ReclaimPolicy,
    states: Mapping[str, WorkerState],
    arenas: Mapping[str, int],
    besides: Collection[str],
) -> Parks | None:
    """The cheapest set of parks that makes room for one that waits; None if nobody waits, or nothing helps.

    ``states`` and ``arenas``: what the engine says. ``besides``: ids of leases that are left alone.
    """

    def may_be_parked(lease: Lease) -> bool:
        namespace = namespaces.of_lease(lease.request.namespace)
        chosen = namespace.reclaim or policy.default
        after_s = namespace.limits.reclaim_after_s
        return (
            chosen is Reclaim.IDLE
            and not lease.request.never_park
            and lease.id in states
            and lease.id not in besides
            and not lease.moving_to
            and liveness.idle_s(lease) >= (policy.after_s if after_s is None else after_s)
            and liveness.resident_s(lease) >= policy.min_resident_s
        )

    leases = {lease.id: lease for lease in tx.leases((LeaseState.ACTIVE,)) if may_be_parked(lease)}
    if not leases:
        return None
    idle = [
        planner.IdleLease(
            lease.id,
            lease.slices,
            liveness.idle_s(lease),
            states[lease.id].used_mib,
            states[lease.id].is_clean,
            states[lease.id].by_server,
        )
        for lease in leases.values()
    ]
    host_mib = dict(arenas)
    for lease in tx.leases((LeaseState.PARKED,)):
        if lease.parked is not None:
            kept_mib = lease.parked.by_server or {lease.slices[0].server: lease.parked.memory_mib}
            for server in kept_mib.keys() & host_mib.keys():
                host_mib[server] -= kept_mib[server]
    in_vain: set[str] = set()  # for whom nobody is parked, because one that is before it would get the room
    while len(in_vain) < MAX_IN_VAIN:
        found = _first_plan(tx, index, grants, policy, idle, host_mib, in_vain)
        if found is None:
            return None
        waiting, lease_ids = found
        by_server = {id: states[id].by_server for id in lease_ids if states[id].by_server}
        parks = Parks(tuple(leases[lease_id] for lease_id in lease_ids), waiting, by_server)
        if grants.starts_without(tx, index, waiting, parks.leases):
            return parks
        in_vain.add(waiting.id)
    return None


def _first_plan(
    tx: BufferedTransaction,
    index: PlacementIndex,
    grants: Grants,
    policy: ReclaimPolicy,
    idle: Sequence[planner.IdleLease],
    host_mib: Mapping[str, int],
    besides: Collection[str],
) -> tuple[Lease, tuple[str, ...]] | None:
    """The first of those that wait for whom leases can be parked, and their ids. ``besides``: ids of those to pass."""
    with closing(grants.heads(tx, index)) as heads:
        for head, used in heads:
            if head.lease.id in besides or (
                head.lease.state is LeaseState.QUEUED
                and not _is_within(policy, head.lease.request, tx, index)
            ):
                continue
            count = len(head.lease.slices) or head.lease.request.num_gpus
            found = planner.plan(head.groups, count, used, idle, host_mib)
            if found is not None:
                return head.lease, found.lease_ids
    return None


def _is_within(
    policy: ReclaimPolicy, request: Request, tx: BufferedTransaction, index: PlacementIndex
) -> bool:
    """Whether parking others for this request keeps to how often the pool's GPUs may be promised."""
    gpus = sum(gpu.healthy for server in index.servers for gpu in server.gpus)
    held = sum(holding.gpus for holding in tx.held().values())
    return held + placement.equivalents(request, index.servers) <= policy.oversubscribe * gpus + 1e-6


def why_parked(lease: Lease, memory_mib: int, waiting: Lease) -> str:
    """The audit trail's words for a lease that was parked."""
    return f"for {for_whom(lease, waiting)}; {memory_mib} MiB are kept in host memory"


def for_whom(lease: Lease, waiting: Lease) -> str:
    """The audit trail's words for one who waits for a lease's GPUs. Other namespaces' users are not named there."""
    request = waiting.request
    is_known = request.namespace == lease.request.namespace
    return f"{request.owner}'s lease {request.id}" if is_known else f"lease {request.id}"
