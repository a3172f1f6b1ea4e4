"""Where leases may go that make room for somebody who waits. Pure, like placement.

A lease moves to GPUs of the model that it has, which its request's filters allow, and all of one server if it has
several. The largest leases choose first. Each takes the GPUs that fit it best, so that large gaps stay.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jupyter_gpupool.core.models import GPU, Lease, Server, Slice

from . import placement

#: What of a GPU a lease keeps when it moves: the model's name, its memory, and whether it is emulated.
Model = tuple[str, int, bool]
#: A GPU with what is free of it, how many idle GPUs its server has, and its place among all GPUs.
_Room = tuple[int, int, int, GPU]


@dataclass(frozen=True)
class Relocation:
    """Where leases go: their new slices, by lease id. ``left``: those for which there is no room, each with what it
    holds as a part of all GPUs of its model."""

    moves: Mapping[str, tuple[Slice, ...]]
    left: Mapping[str, float]

    @property
    def missing(self) -> float:
        """How much room is missing for those that are left, as a part of all GPUs of their models.

        Room comes where leases end, so it comes the sooner the more GPUs a model has: one GPU of two hundred is there
        long before one of eight.
        """
        return round(sum(self.left.values()), 9)


class FreeRoom:
    """What is free of each GPU. ``used``: MiB granted by GPU uuid. ``within_server``: whether leases may move to other
    GPUs of their own server."""

    def __init__(
        self, servers: Iterable[Server], used: Mapping[str, int], within_server: bool = True
    ) -> None:
        self._within_server = within_server
        self._rooms: dict[Model, list[_Room]] = {}
        self._on: dict[str, int] = {}
        self._gpus: Counter[Model] = Counter()
        place = 0
        for server in servers:
            if server.draining:
                continue
            idle = sum(not used.get(gpu.uuid) and not gpu.taken_mib for gpu in server.gpus)
            for gpu in server.gpus:
                place += 1
                self._gpus[_model(gpu)] += gpu.healthy
                free = gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0)
                if free > 0 and gpu.healthy:
                    self._on[gpu.uuid] = free
                    self._rooms.setdefault(_model(gpu), []).append((free, idle, place, gpu))
        for rooms in self._rooms.values():
            rooms.sort()
        self._free = {
            model: sum(free for free, *_ in rooms) / model[1] for model, rooms in self._rooms.items()
        }

    def min_missing(self, leases: Iterable[Lease], but_for: Collection[GPU]) -> float:
        """A lower bound of what is :attr:`~Relocation.missing` after :meth:`relocate`."""
        wanted: dict[Model, float] = {}
        for lease in leases:
            for piece in lease.slices:
                model = _model_of(piece)
                wanted[model] = wanted.get(model, 0.0) + piece.memory_mib / piece.total_mib
        if not wanted:
            return 0.0
        total = 0.0
        for model, gpus in wanted.items():
            there = sum(self._on.get(gpu.uuid, 0) for gpu in but_for if _model(gpu) == model)
            missing = max(0.0, gpus - self._free.get(model, 0.0) + there / model[1])
            total += missing / max(1, self._gpus[model])
        return round(total, 9)

    def relocate(self, leases: Sequence[Lease], but_for: Collection[GPU]) -> Relocation:
        """Find other GPUs for these leases, none of them in ``but_for``."""
        forbidden = {gpu.uuid for gpu in but_for}
        rooms: dict[Model, list[_Room]] = {}
        moves: dict[str, tuple[Slice, ...]] = {}
        left: dict[str, float] = {}
        for lease in sorted(leases, key=_largest_first):
            model = _model_of(lease.slices[0])
            if model not in rooms:
                rooms[model] = [room for room in self._rooms.get(model, ()) if room[3].uuid not in forbidden]
            gpus = _choose(lease, rooms[model], self._within_server)
            if gpus is None:
                gpus_held = sum(piece.memory_mib / piece.total_mib for piece in lease.slices)
                left[lease.id] = gpus_held / max(1, self._gpus[model])
            else:
                moves[lease.id] = gpus
        return Relocation(moves, left)


def has_one_shape(lease: Lease) -> bool:
    """Whether a lease's slices are alike and on one server, so that it can move as a whole."""
    first = lease.slices[0]
    return all(
        (piece.server, piece.memory_mib, _model_of(piece))
        == (first.server, first.memory_mib, _model_of(first))
        for piece in lease.slices
    )


def _choose(lease: Lease, rooms: list[_Room], within_server: bool) -> tuple[Slice, ...] | None:
    """The lease's slices on GPUs of ``rooms``, which are taken out of it; None if there is no room."""
    mib, count = lease.slices[0].memory_mib, len(lease.slices)
    own = {piece.gpu_uuid for piece in lease.slices}
    server = "" if within_server else lease.slices[0].server
    fitting = (
        room
        for room in rooms[bisect_left(rooms, (mib,)) :]
        if room[3].uuid not in own and room[3].server != server and placement.matches(lease.request, room[3])
    )
    chosen: list[_Room] | None
    if count == 1:
        one = next(fitting, None)
        chosen = None if one is None else [one]
    else:
        chosen = _on_one_server(fitting, count)
    if chosen is None:
        return None
    for room in chosen:
        rooms.remove(room)
        if room[0] > mib:
            insort(rooms, (room[0] - mib, *room[1:]))
    gpus = sorted((room[3] for room in chosen), key=lambda gpu: gpu.index)
    return tuple(
        replace(piece, gpu_uuid=gpu.uuid, server=gpu.server, index=gpu.index)
        for piece, gpu in zip(lease.slices, gpus, strict=True)
    )


def _on_one_server(fitting: Iterable[_Room], count: int) -> list[_Room] | None:
    by_server: dict[str, list[_Room]] = {}
    for room in fitting:
        by_server.setdefault(room[3].server, []).append(room)
    found = [some for some in by_server.values() if len(some) >= count]
    if not found:
        return None
    return min(found, key=lambda some: (len(some), some[0][:3]))[:count]


def _largest_first(lease: Lease) -> tuple[int, int, str]:
    return -len(lease.slices), -lease.slices[0].memory_mib, lease.id


def _model(gpu: GPU) -> Model:
    return gpu.name, gpu.memory_mib, gpu.emulated


def _model_of(piece: Slice) -> Model:
    return piece.name, piece.total_mib, piece.emulated
