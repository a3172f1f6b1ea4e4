"""Where a lease may move. Pure, like placement.

It takes as much of as many GPUs of the same model, on one other server that its request allows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from jupyter_gpupool.core.models import GPU, Lease, Server, Slice

from . import placement


def find(
    lease: Lease, servers: Sequence[Server], used: Mapping[str, int], besides: Collection[str] = ()
) -> tuple[Slice, ...] | str:
    """The slices that the lease would have on another server, or why there are none, in one line.

    ``used``: MiB granted by GPU uuid. ``besides``: names of servers that are not to be used. Of the servers with room,
    the one that is left with the least memory on these GPUs.
    """
    objection = immovable(lease)
    if objection:
        return objection
    own = lease.slices[0].server
    share = max(piece.memory_mib for piece in lease.slices)
    count, is_possible = len(lease.slices), False
    best: tuple[int, str, list[GPU]] | None = None
    for server in servers:
        if server.name == own or server.name in besides:
            continue
        fitting = _fitting(lease, server)
        is_possible = is_possible or len(fitting) >= count
        free = {gpu.uuid: gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0) - share for gpu in fitting}
        room = sorted((gpu for gpu in fitting if free[gpu.uuid] >= 0), key=lambda g: (free[g.uuid], g.index))
        if len(room) >= count:
            left = sum(free[gpu.uuid] for gpu in room[:count])
            if best is None or (left, server.name) < best[:2]:
                best = left, server.name, sorted(room[:count], key=lambda gpu: gpu.index)
    if best is None:
        gpus = "a GPU" if count == 1 else f"{count} GPUs"
        if not is_possible:
            return f"no other GPU server has {gpus} of its model that its request allows"
        return f"no other GPU server has {share} MiB of {gpus} free"
    return tuple(
        replace(piece, gpu_uuid=gpu.uuid, server=gpu.server, index=gpu.index)
        for piece, gpu in zip(lease.slices, best[2], strict=True)
    )


def groups(lease: Lease, servers: Sequence[Server]) -> list[list[tuple[GPU, int]]]:
    """The GPUs of each other server on which the lease could be, with the MiB that it takes of each."""
    if immovable(lease):
        return []
    own, share = lease.slices[0].server, max(piece.memory_mib for piece in lease.slices)
    return [[(gpu, share) for gpu in _fitting(lease, server)] for server in servers if server.name != own]


def _fitting(lease: Lease, server: Server) -> list[GPU]:
    model = _model(lease.slices[0])
    return [
        gpu
        for gpu, _ in placement.eligible(lease.request, server)
        if (gpu.name, gpu.memory_mib, gpu.emulated) == model
    ]


def immovable(lease: Lease) -> str:
    """Why the lease can be moved nowhere, in one line; empty if it may be."""
    if len({piece.server for piece in lease.slices}) > 1:
        return "it spans servers, and such leases are not moved"
    if len({_model(piece) for piece in lease.slices}) > 1:
        return "its GPUs are of several models, and such leases are not moved"
    if not all(piece.emulated for piece in lease.slices):
        return "it has real GPUs, and moving them is not supported yet"
    return ""


def _model(piece: Slice) -> tuple[str, int, bool]:
    return piece.name, piece.total_mib, piece.emulated
