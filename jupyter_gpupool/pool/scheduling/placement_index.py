"""The answers of :mod:`.placement`, without examining every GPU for each request: for pools of thousands of GPUs.

For each shape of request (number of GPUs, memory of each, filters) the index keeps the best choice on each server.
After a grant or a release it examines the server of the changed GPU again, and no other.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from jupyter_gpupool.core.models import GPU, Request, Server, Slice

from . import placement, reservation
from .policy import FEW_SERVERS, PlacementPolicy
from .relocation import FreeRoom
from .reservation import Candidate, Cost, LeasesOn, Movable, Reservation

#: The most shapes kept; users ask for few.
_MAX_SHAPES = 128
#: The most changes kept, before every shape is built again.
_MAX_CHANGES = 50_000


class Granted(dict[str, int]):
    """MiB granted by GPU uuid, and the order in which they changed."""

    def __init__(self, values: Mapping[str, int]) -> None:
        super().__init__(values)
        self.changes: list[str] = []
        self.trials: list[tuple[str, int]] = []

    def use_on_trial(self, uuid: str, more_mib: int) -> None:
        """As ``use``, until :func:`trial_grants` ends."""
        self.use(uuid, more_mib)
        self.trials.append((uuid, more_mib))

    def use(self, uuid: str, more_mib: int) -> None:
        """Add MiB to what is granted of a GPU; negative to free some."""
        self[uuid] = self.get(uuid, 0) + more_mib
        if len(self.changes) >= _MAX_CHANGES:
            self.changes = []
        self.changes.append(uuid)


@contextmanager
def trial_grants(used: Mapping[str, int]) -> Iterator[Granted]:
    """What is granted, with trial grants on top that are undone at the end."""
    trial = used if isinstance(used, Granted) else Granted(used)
    before = len(trial.trials)
    try:
        yield trial
    finally:
        while len(trial.trials) > before:
            uuid, more_mib = trial.trials.pop()
            trial.use(uuid, -more_mib)


class PlacementIndex:
    """Places requests on one set of servers by one policy. Not thread-safe: its owner calls it from one thread."""

    def __init__(
        self,
        servers: Sequence[Server],
        policy: PlacementPolicy = FEW_SERVERS,
        demand: placement.Demand = placement.NO_DEMAND,
    ) -> None:
        self.servers = servers
        self.policy = policy
        self.demand = demand
        self._server_of = {gpu.uuid: n for n, server in enumerate(servers) for gpu in server.gpus}
        self._shapes: OrderedDict[Hashable, RequestShape | SpreadShape] = OrderedDict()
        self._heads: OrderedDict[Hashable, HeadShape] = OrderedDict()
        self._impossible: OrderedDict[Hashable, str | None] = OrderedDict()
        self._changes: list[str] | None = None

    def place(self, request: Request, used: Mapping[str, int]) -> tuple[Slice, ...] | None:
        """As :func:`placement.place`; fast if ``used`` is the same :class:`Granted` as before."""
        if not isinstance(used, Granted):
            return placement.place(request, self.servers, used, self.policy, self.demand)
        self._follow(used)
        key = shape_key(request)
        shape = self._shapes.get(key)
        if shape is None:
            kind = SpreadShape if request.spread else RequestShape
            shape = self._shapes[key] = kind(request, self.servers, used, self.policy, self.demand)
            if len(self._shapes) > _MAX_SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        found = shape.best(used, self._server_of)
        return None if found is None else placement.slices(request, found)

    def reserve(
        self,
        request: Request,
        used: Mapping[str, int],
        leases_on: LeasesOn,
        movable: Movable | None = None,
    ) -> Reservation | None:
        """As :func:`reservation.reserve`; fast if ``used`` is the same :class:`Granted` as before, and what
        ``leases_on`` returns for a GPU changes only with it."""
        if request.spread or not isinstance(used, Granted):
            return reservation.reserve(request, self.servers, used, leases_on, movable)
        self._follow(used)
        key = shape_key(request)
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = HeadShape(request, self.servers)
            if len(self._heads) > _MAX_SHAPES:
                self._heads.popitem(last=False)
        self._heads.move_to_end(key)
        if movable is not None:
            groups = head.groups(used, self._server_of, leases_on)
            return reservation.reserve_by_moving(
                request, groups, FreeRoom(self.servers, used, movable.within_server), movable
            )
        found = head.best(used, self._server_of, leases_on)
        return None if found is None else reservation.reservation(request, found)

    def _follow(self, used: Granted) -> None:
        """Forget every shape if this is not what they were built from."""
        if used.changes is not self._changes:
            self._shapes.clear()
            self._heads.clear()
            self._changes = used.changes

    def impossible(self, request: Request) -> str | None:
        """As :func:`placement.impossible`."""
        key = shape_key(request)
        if key not in self._impossible:
            self._impossible[key] = placement.impossible(request, self.servers)
            if len(self._impossible) > _MAX_SHAPES:
                self._impossible.popitem(last=False)
        self._impossible.move_to_end(key)
        return self._impossible[key]


class RequestShape:
    """The best choice on each server for one shape of request, and the best of them all."""

    def __init__(
        self,
        request: Request,
        servers: Sequence[Server],
        used: Granted,
        policy: PlacementPolicy,
        demand: placement.Demand,
    ) -> None:
        self._policy = policy
        self._demand = demand
        self._count = request.num_gpus
        self._eligible = [placement.eligible(request, server) for server in servers]
        self._build(used)

    def _build(self, used: Granted) -> None:
        self._best = [
            placement.choose_on_server(gpus, self._count, used, self._policy, self._demand)
            for gpus in self._eligible
        ]
        self._order = [(best[0], n) for n, best in enumerate(self._best) if best is not None]
        heapq.heapify(self._order)
        self._seen = len(used.changes)

    def best(self, used: Granted, server_of: Mapping[str, int]) -> list[GPU] | None:
        """The GPUs that the policy chooses now; None if too few have room."""
        fresh = used.changes[self._seen :]
        if fresh:
            self._seen = len(used.changes)
            for n in {server_of[uuid] for uuid in fresh if uuid in server_of}:
                found = self._best[n] = placement.choose_on_server(
                    self._eligible[n], self._count, used, self._policy, self._demand
                )
                if found is not None:
                    heapq.heappush(self._order, (found[0], n))
            if len(self._order) > 8 * len(self._best) + 64:
                self._build(used)
        while self._order:
            key, n = self._order[0]
            current = self._best[n]
            if current is not None and current[0] == key:
                return current[1]
            heapq.heappop(self._order)  # out of date
        return None


class HeadShape:
    """The GPUs of each server for which the fewest leases have to end, for one shape of request."""

    def __init__(self, request: Request, servers: Sequence[Server]) -> None:
        self._count = request.num_gpus
        self._eligible = [placement.eligible(request, server) for server in servers]
        self._groups: list[list[Candidate]] = [[] for _ in servers]
        self._best: list[tuple[Cost, list[Candidate]] | None] = [None] * len(servers)
        self._seen: int | None = None

    def best(
        self, used: Granted, server_of: Mapping[str, int], leases_on: LeasesOn
    ) -> list[Candidate] | None:
        """The GPUs for which the fewest leases have to end now; None if no server could serve the request."""
        self.groups(used, server_of, leases_on)
        found = min((best for best in self._best if best is not None), key=lambda best: best[0], default=None)
        return None if found is None else found[1]

    def groups(
        self, used: Granted, server_of: Mapping[str, int], leases_on: LeasesOn
    ) -> list[list[Candidate]]:
        """What the request could get of each server now."""
        if self._seen is None:
            stale: Iterable[int] = range(len(self._best))
        else:
            stale = {server_of[uuid] for uuid in used.changes[self._seen :] if uuid in server_of}
        self._seen = len(used.changes)
        for n in stale:
            self._groups[n] = reservation.candidates(self._eligible[n], used, leases_on)
            self._best[n] = reservation.choose(self._groups[n], self._count)
        return self._groups


class SpreadShape:
    """The room on each server for one shape of request that may use several servers."""

    def __init__(
        self,
        request: Request,
        servers: Sequence[Server],
        used: Granted,
        policy: PlacementPolicy,
        demand: placement.Demand,
    ) -> None:
        self._policy = policy
        self._demand = demand
        self._count = request.num_gpus
        self._eligible = [placement.eligible(request, server) for server in servers]
        self._rooms = [placement.room(gpus, used, self._policy) for gpus in self._eligible]
        self._seen = len(used.changes)

    def best(self, used: Granted, server_of: Mapping[str, int]) -> list[GPU] | None:
        """The GPUs that the policy chooses now; None if too few have room."""
        fresh = used.changes[self._seen :]
        self._seen = len(used.changes)
        for n in {server_of[uuid] for uuid in fresh if uuid in server_of}:
            self._rooms[n] = placement.room(self._eligible[n], used, self._policy)
        return self._policy.choose_across(self._rooms, self._count)


def shape_key(request: Request) -> Hashable:
    """Equal for requests that differ in nothing that placement looks at."""
    return (
        request.num_gpus,
        request.spread,
        request.partial,
        request.memory_mib,
        *sorted(request.filters.items()),
    )
