"""Where a lease may move. Pure, like placement.

It takes as much of as many GPUs of the same model, on one other server that its request allows. Of a lease that spans
servers the part on one of them moves, to a server on which it has no other part: it has one worker on each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from jupyter_gpupool.core.models import GPU, Lease, Server, Slice

from . import placement


def find(
    lease: Lease,
    servers: Sequence[Server],
    used: Mapping[str, int],
    besides: Collection[str] = (),
    leaving: str = "",
) -> tuple[Slice, ...] | str:
    """The slices that the lease would have once it has moved, or why it cannot, in one line.

    ``used``: MiB granted by GPU uuid. ``besides``: names of servers that are not to be used. ``leaving``: the server
    that it leaves, which has to be named for a lease that spans servers. Of the servers with room, the one that is left
    with the least memory on these GPUs.
    """
    own = {piece.server for piece in lease.slices}
    part = tuple(piece for piece in lease.slices if len(own) == 1 or piece.server == leaving)
    if not part:
        return "it spans servers, and moves only where one of them is drained"
    objection = immovable(part) or _missing(lease, part, servers, used)
    if objection:
        return objection
    share = max(piece.memory_mib for piece in part)
    count, is_possible = len(part), False
    best: tuple[int, str, list[GPU]] | None = None
    for server in servers:
        if server.name in own or server.name in besides:
            continue
        fitting = _fitting(lease, part, server)
        is_possible = is_possible or len(fitting) >= count
        free = {gpu.uuid: gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0) - share for gpu in fitting}
        room = sorted((gpu for gpu in fitting if free[gpu.uuid] >= 0), key=lambda g: (free[g.uuid], g.index))
        if len(room) >= count:
            left = sum(free[gpu.uuid] for gpu in room[:count])
            if best is None or (left, server.name) < best[:2]:
                best = left, server.name, sorted(room[:count], key=lambda gpu: gpu.index)
    if best is None:
        gpus = "a GPU" if count == 1 else f"{count} GPUs"
        which = "no other GPU server" if len(own) == 1 else "no GPU server that it does not use"
        if not is_possible:
            return f"{which} has {gpus} of its model that its request allows"
        return f"{which} has {share} MiB of {gpus} free"
    there = {piece.gpu_uuid: gpu for piece, gpu in zip(part, best[2], strict=True)}
    return tuple(
        replace(piece, gpu_uuid=gpu.uuid, server=gpu.server, index=gpu.index)
        if (gpu := there.get(piece.gpu_uuid))
        else piece
        for piece in lease.slices
    )


def _missing(lease: Lease, part: Sequence[Slice], servers: Sequence[Server], used: Mapping[str, int]) -> str:
    """Why a parked lease cannot run, though a part of it moves; empty if it can: its other slices are to be its own
    again."""
    if lease.state.holds:
        return ""
    gpus = {gpu.uuid: gpu for server in servers for gpu in server.gpus if gpu.healthy}
    for piece in lease.slices:
        gpu = gpus.get(piece.gpu_uuid)
        if piece not in part and (
            gpu is None or gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0) < piece.memory_mib
        ):
            return f"it is parked, and what it had on {piece.server} is not free"
    return ""


def groups(lease: Lease, servers: Sequence[Server]) -> list[list[tuple[GPU, int]]]:
    """The GPUs of each other server on which the whole lease could be, with the MiB that it takes of each."""
    own = {piece.server for piece in lease.slices}
    if len(own) > 1 or immovable(lease.slices):
        return []
    share = max(piece.memory_mib for piece in lease.slices)
    return [
        [(gpu, share) for gpu in _fitting(lease, lease.slices, server)]
        for server in servers
        if server.name not in own
    ]


def _fitting(lease: Lease, part: Sequence[Slice], server: Server) -> list[GPU]:
    model = _model(part[0])
    return [
        gpu
        for gpu, _ in placement.eligible(lease.request, server)
        if (gpu.name, gpu.memory_mib, gpu.emulated) == model
    ]


def immovable(part: Sequence[Slice]) -> str:
    """Why slices of one server can be moved nowhere, in one line; empty if they may be."""
    if len({_model(piece) for piece in part}) > 1:
        return "its GPUs are of several models, and such leases are not moved"
    if not all(piece.emulated for piece in part):
        return "it has real GPUs, and moving them is not supported yet"
    return ""


def _model(piece: Slice) -> tuple[str, int, bool]:
    return piece.name, piece.total_mib, piece.emulated
