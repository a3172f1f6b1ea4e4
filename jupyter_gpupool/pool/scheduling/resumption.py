"""Where a parked lease may resume. Pure, like placement.

A lease resumes on the GPUs that it had. If its GPUs are emulated and all of one model, other GPUs of that model on the
same server serve as well: the worker's process stays, and a process cannot leave a real GPU for another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jupyter_gpupool.core.models import GPU, Lease, Server, Slice

from . import reservation
from .reservation import LeasesOn


def eligible(lease: Lease, servers: Sequence[Server]) -> list[tuple[GPU, int]]:
    """The GPUs on which the lease may resume, each with the MiB that it takes there.

    A server on which nothing new is placed may take its own leases back. An unhealthy GPU serves no lease.
    """
    pieces = {piece.gpu_uuid: piece for piece in lease.slices}
    first = lease.slices[0]
    model = _model(first)
    is_movable = all(piece.emulated and _model(piece) == model for piece in lease.slices)
    found = []
    for server in servers:
        for gpu in server.gpus if server.name == first.server else ():
            own = pieces.get(gpu.uuid)
            if not gpu.healthy:
                continue
            if own is not None:
                found.append((gpu, own.memory_mib))
            elif is_movable and (gpu.name, gpu.memory_mib, gpu.emulated) == model:
                found.append((gpu, first.memory_mib))
    return found


def place(lease: Lease, servers: Sequence[Server], used: Mapping[str, int]) -> tuple[Slice, ...] | None:
    """The slices on which a parked lease resumes now; None while there is no room.

    ``used``: MiB granted by GPU uuid. Its own GPUs go first, then those that are left with the least memory. The slices
    are ordered as before, so that its program's device numbers stay.
    """
    own = {piece.gpu_uuid for piece in lease.slices}
    found = []
    for gpu, share in eligible(lease, servers):
        left = gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0) - share
        if left >= 0:
            found.append((gpu.uuid not in own, left, gpu.index, gpu))
    if len(found) < len(lease.slices):
        return None
    chosen = [gpu for *_, gpu in sorted(found, key=lambda entry: entry[:3])[: len(lease.slices)]]
    if {gpu.uuid for gpu in chosen} == own:
        return lease.slices
    chosen.sort(key=lambda gpu: gpu.index)
    return tuple(
        replace(piece, gpu_uuid=gpu.uuid, index=gpu.index)
        for piece, gpu in zip(lease.slices, chosen, strict=True)
    )


def keep(
    lease: Lease, servers: Sequence[Server], used: Mapping[str, int], leases_on: LeasesOn
) -> Mapping[str, int]:
    """What is kept free for a parked lease that waits, by GPU uuid: where the fewest leases have to end."""
    group = reservation.candidates(eligible(lease, servers), used, leases_on)
    found = reservation.choose(group, len(lease.slices))
    return {} if found is None else reservation.blocked_mib(found[1])


def _model(piece: Slice) -> tuple[str, int, bool]:
    return piece.name, piece.total_mib, piece.emulated
