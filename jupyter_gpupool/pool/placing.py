"""What :mod:`.placement` answers, without looking at every GPU for each request: for farms of thousands.

A placer remembers, for each shape of request that it was asked about (how many GPUs, how much of each, which filters),
the best that each server can give. A change of what is granted makes it look at that GPU's server again, no other.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from . import placement
from .models import GPU, Request, Server, Slice

#: How many shapes are remembered; people ask for few.
_SHAPES = 128
#: How many changes are remembered, and how many answers of one shape may be out of date, before all is looked at anew.
_CHANGES = 50_000


class Granted(dict[str, int]):
    """MiB granted by GPU uuid, and which of them changed, in order."""

    def __init__(self, values: Mapping[str, int]) -> None:
        super().__init__(values)
        self.changes: list[str] = []
        self.trials: list[tuple[str, int]] = []

    def try_out(self, uuid: str, more_mib: int) -> None:
        """As ``use``, until :func:`on_trial` ends."""
        self.use(uuid, more_mib)
        self.trials.append((uuid, more_mib))

    def use(self, uuid: str, more_mib: int) -> None:
        self[uuid] = self.get(uuid, 0) + more_mib
        if len(self.changes) >= _CHANGES:
            self.changes = []
        self.changes.append(uuid)


def place(request: Request, servers: Sequence[Server], used: Mapping[str, int]) -> tuple[Slice, ...] | None:
    """As :func:`placement.place`; fast where ``used`` is what was :class:`Granted`, and ``servers`` the same object."""
    if not isinstance(used, Granted):
        return placement.place(request, servers, used)
    return _placer_of(servers).place(request, used)


def impossible(request: Request, servers: Sequence[Server]) -> str | None:
    """As :func:`placement.impossible`; fast where ``servers`` are the same object again."""
    return _placer_of(servers).impossible(request)


@contextmanager
def on_trial(used: Mapping[str, int]) -> Iterator[Granted]:
    """What was granted, to be used as if more were; all of that is taken back at the end."""
    trial = used if isinstance(used, Granted) else Granted(used)
    before = len(trial.trials)
    try:
        yield trial
    finally:
        while len(trial.trials) > before:
            uuid, more_mib = trial.trials.pop()
            trial.use(uuid, -more_mib)


class Placer:
    """For one set of servers."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers
        self._server_of = {gpu.uuid: n for n, server in enumerate(servers) for gpu in server.gpus}
        self._shapes: OrderedDict[Hashable, _Shape | _Spread] = OrderedDict()
        self._impossible: OrderedDict[Hashable, str | None] = OrderedDict()
        self._changes: list[str] | None = None

    def place(self, request: Request, used: Granted) -> tuple[Slice, ...] | None:
        """As :func:`placement.place`."""
        if used.changes is not self._changes:
            self._shapes.clear()
            self._changes = used.changes
        key = _key(request)
        shape = self._shapes.get(key)
        if shape is None:
            kind = _Spread if request.spread else _Shape
            shape = self._shapes[key] = kind(request, self.servers, used)
            if len(self._shapes) > _SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        found = shape.best(used, self._server_of)
        return None if found is None else placement.slices(request, found)

    def impossible(self, request: Request) -> str | None:
        """As :func:`placement.impossible`."""
        key = _key(request)
        if key not in self._impossible:
            self._impossible[key] = placement.impossible(request, self.servers)
            if len(self._impossible) > _SHAPES:
                self._impossible.popitem(last=False)
        self._impossible.move_to_end(key)
        return self._impossible[key]


class _Shape:
    """The best of each server for one shape of request, and of all of them the best."""

    def __init__(self, request: Request, servers: Sequence[Server], used: Granted) -> None:
        self._count = request.num_gpus
        self._eligible = [placement.eligible(request, server) for server in servers]
        self._build(used)

    def _build(self, used: Granted) -> None:
        self._best = [placement.best_fit(gpus, self._count, used) for gpus in self._eligible]
        self._order = [(best[0], n) for n, best in enumerate(self._best) if best is not None]
        heapq.heapify(self._order)
        self._seen = len(used.changes)

    def best(self, used: Granted, server_of: Mapping[str, int]) -> list[GPU] | None:
        fresh = used.changes[self._seen :]
        if fresh:
            self._seen = len(used.changes)
            for n in {server_of[uuid] for uuid in fresh if uuid in server_of}:
                found = self._best[n] = placement.best_fit(self._eligible[n], self._count, used)
                if found is not None:
                    heapq.heappush(self._order, (found[0], n))
            if len(self._order) > 8 * len(self._best) + 64:
                self._build(used)
        while self._order:
            rest, n = self._order[0]
            current = self._best[n]
            if current is not None and current[0] == rest:
                return current[1]
            heapq.heappop(self._order)  # it was so once
        return None


class _Spread:
    """The same of one whose GPUs may be of several servers: where each has room."""

    def __init__(self, request: Request, servers: Sequence[Server], used: Granted) -> None:
        self._count = request.num_gpus
        self._eligible = [placement.eligible(request, server) for server in servers]
        self._rooms = [placement.room(gpus, used) for gpus in self._eligible]
        self._seen = len(used.changes)

    def best(self, used: Granted, server_of: Mapping[str, int]) -> list[GPU] | None:
        fresh = used.changes[self._seen :]
        self._seen = len(used.changes)
        for n in {server_of[uuid] for uuid in fresh if uuid in server_of}:
            self._rooms[n] = placement.room(self._eligible[n], used)
        return placement.few_servers(self._rooms, self._count)


#: The placers of the servers that this thread has asked about lately.
_mine = threading.local()


def _placer_of(servers: Sequence[Server]) -> Placer:
    placers: list[Placer] = _mine.__dict__.setdefault("placers", [])
    for placer in placers:
        if placer.servers is servers:
            return placer
    placers.append(Placer(servers))
    del placers[:-3]
    return placers[-1]


def _key(request: Request) -> Hashable:
    return request.num_gpus, request.spread, request.partial, request.memory_mib, *sorted(request.filters.items())
