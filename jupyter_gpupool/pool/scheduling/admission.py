"""Which queued requests are granted now. Pure: the queue and what is held in, a plan out.

The first request of a namespace that waits for memory has a :class:`~.reservation.Reservation`. Requests after it, of
any namespace, are granted only what it does not need. A request that waits for its namespace's limit delays the later
ones of its namespace, and one that waits for its own user's share only that user's. A request that no current server
could satisfy (a server may be away, or a limit was lowered) keeps its place but does not delay others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from jupyter_gpupool.core.models import Lease, Namespace, Slice

from . import quotas
from .placement_index import Granted, PlacementIndex, shape_key, trial_grants
from .quotas import Held, Holding
from .reservation import LeasesOn, Movable, Reservation

#: Why a request waits although enough memory is free.
KEPT_FREE = "what is free is kept for a request that came earlier"


@dataclass
class GrantPlan:
    """What to grant, in order; what goes on waiting, in order; and the limits that block it, by lease id.

    ``reserved``: what is kept for the heads of the queue, by lease id.
    """

    granted: list[tuple[Lease, tuple[Slice, ...]]] = field(default_factory=list)
    waiting: list[Lease] = field(default_factory=list)
    waits_for: dict[str, str] = field(default_factory=dict)
    reserved: dict[str, Reservation] = field(default_factory=dict)


def plan_grants(
    queue: Sequence[Lease],
    index: PlacementIndex,
    used: Mapping[str, int],
    held: Held,
    namespace: Callable[[str], Namespace],
    gone: Callable[[Lease], bool],
    leases_on: LeasesOn,
    movable: Movable | None = None,
) -> GrantPlan:
    """Grant what fits of a queue in fair order.

    ``used``: MiB granted by GPU uuid. ``held``: what is held by (namespace, owner). ``gone``: whether a request's
    holder is silent, so that the request no longer counts. ``movable``: the leases that may move for the heads.
    """
    with trial_grants(used) as room:
        return _Pass(index, room, dict(held), namespace, gone, leases_on, movable).over(queue)


class _Pass:
    """One pass over a queue. ``room``: what is granted, and what this pass grants and keeps free."""

    def __init__(
        self,
        index: PlacementIndex,
        room: Granted,
        holding: dict[tuple[str, str], Holding],
        namespace: Callable[[str], Namespace],
        gone: Callable[[Lease], bool],
        leases_on: LeasesOn,
        movable: Movable | None,
    ) -> None:
        self._index, self._room, self._holding = index, room, holding
        self._namespace, self._gone, self._leases_on = namespace, gone, leases_on
        self._movable = movable
        self._plan = GrantPlan()
        self._stuck: dict[tuple[str, str | None], str] = {}  # with the limit that blocks
        self._heads: set[str] = set()  # the namespaces whose first request has been found
        self._full: dict[Hashable, list[str]] = {}  # what there is no room for, with who asks for it

    def over(self, queue: Sequence[Lease]) -> GrantPlan:
        """Look at each request once."""
        for lease in queue:
            slices = None if self._gone(lease) else self._place(lease)
            if slices is None:
                self._plan.waiting.append(lease)
                continue
            self._plan.granted.append((lease, slices))
            for piece in slices:
                self._room.use_on_trial(piece.gpu_uuid, piece.memory_mib)
            self._hold(lease, slices)
        self._explain(queue)
        return self._plan

    def _place(self, lease: Lease) -> tuple[Slice, ...] | None:
        name, owner = lease.request.namespace, lease.request.owner
        shape = shape_key(lease.request)
        if shape in self._full and name in self._heads:
            self._full[shape].append(lease.id)
            return None
        of = self._namespace(name)
        within = quotas.bounds(of, owner, self._holding)
        slices, limit, users = quotas.place(lease.request, self._index, self._room, within)
        is_blocked = any(key in self._stuck for key in ((name, None), (name, owner)))
        if limit:
            self._plan.waits_for[lease.id] = limit
        if is_blocked:  # not its turn: placed only to find the limit that blocks it
            return None
        if slices is not None:
            return slices
        if limit:
            if not quotas.impossible(lease.request, self._index, of, owner):
                self._stuck[name, owner if users else None] = limit
            return None
        self._full.setdefault(shape, []).append(lease.id)
        if name not in self._heads and not quotas.impossible(lease.request, self._index, of, owner):
            self._heads.add(name)
            self._reserve(lease, within)
        return None

    def _reserve(self, lease: Lease, within: Sequence[quotas.Bound]) -> None:
        """Keep for the head of a namespace what it needs, unless a limit blocks it besides."""
        name, owner = lease.request.namespace, lease.request.owner
        reservation = self._index.reserve(lease.request, self._room, self._leases_on, self._movable)
        if reservation is None:
            return
        objection = quotas.first_objection(within, reservation.slices)
        if objection is not None:
            self._plan.waits_for[lease.id], users = objection
            self._stuck[name, owner if users else None] = objection[0]
            return
        self._plan.reserved[lease.id] = reservation
        for uuid, blocked_mib in reservation.blocked_mib.items():
            if blocked_mib:
                self._room.use_on_trial(uuid, blocked_mib)
        self._hold(lease, reservation.slices)  # nobody may take its part of a limit either

    def _hold(self, lease: Lease, slices: Sequence[Slice]) -> None:
        key = lease.request.namespace, lease.request.owner
        self._holding[key] = self._holding.get(key, Holding()) + quotas.of_slices(slices)

    def _explain(self, queue: Sequence[Lease]) -> None:
        """Tell those that wait only because of a reservation."""
        if not self._full or not any(any(one.blocked_mib.values()) for one in self._plan.reserved.values()):
            return
        requests = {lease.id: lease.request for lease in queue}
        for reservation in self._plan.reserved.values():
            for uuid, blocked_mib in reservation.blocked_mib.items():
                if blocked_mib:
                    self._room.use_on_trial(uuid, -blocked_mib)
        for ids in self._full.values():
            if self._index.place(requests[ids[0]], self._room) is not None:
                self._plan.waits_for.update(dict.fromkeys(ids, KEPT_FREE))
