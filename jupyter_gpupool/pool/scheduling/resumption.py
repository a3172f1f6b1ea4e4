"""Where a parked lease may resume. Pure, like placement.

A lease resumes on the GPUs that it had. If its GPUs are emulated and all of one model, other GPUs of that model on the
same server serve as well: the worker's process stays, and a process cannot leave a real GPU for another one. A lease
that spans servers resumes on all of them or on none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jupyter_gpupool.core.models import GPU, Lease, Server, Slice

from . import reservation
from .reservation import LeasesOn


def group(lease: Lease, servers: Sequence[Server]) -> list[tuple[GPU, int]]:
    """The GPUs that serve the lease together if there is room on as many as it has slices, each with the MiB that it
    takes there. Those of a lease that spans servers are its own."""
    parts = _parts(lease)
    own = {piece.gpu_uuid for piece in lease.slices}
    return [
        (gpu, share)
        for part in parts
        for gpu, share in eligible(part, servers)
        if len(parts) == 1 or gpu.uuid in own
    ]


def eligible(part: Lease, servers: Sequence[Server]) -> list[tuple[GPU, int]]:
    """The GPUs on which the part of a lease that is on one server may resume, each with the MiB that it takes there.

    A server on which nothing new is placed may take its own leases back. An unhealthy GPU serves no lease.
    """
    pieces = {piece.gpu_uuid: piece for piece in part.slices}
    first = part.slices[0]
    model = _model(first)
    is_movable = all(piece.emulated and _model(piece) == model for piece in part.slices)
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
    placed: dict[str, Slice] = {}  # by the uuid of the GPU that each slice was on
    for part in _parts(lease):
        found = _place(part, servers, used)
        if found is None:
            return None
        placed.update((before.gpu_uuid, now) for before, now in zip(part.slices, found, strict=True))
    return tuple(placed[piece.gpu_uuid] for piece in lease.slices)


def _place(part: Lease, servers: Sequence[Server], used: Mapping[str, int]) -> tuple[Slice, ...] | None:
    own = {piece.gpu_uuid for piece in part.slices}
    found = []
    for gpu, share in eligible(part, servers):
        left = gpu.memory_mib - gpu.taken_mib - used.get(gpu.uuid, 0) - share
        if left >= 0:
            found.append((gpu.uuid not in own, left, gpu.index, gpu))
    if len(found) < len(part.slices):
        return None
    chosen = [gpu for *_, gpu in sorted(found, key=lambda entry: entry[:3])[: len(part.slices)]]
    if {gpu.uuid for gpu in chosen} == own:
        return part.slices
    chosen.sort(key=lambda gpu: gpu.index)
    return tuple(
        replace(piece, gpu_uuid=gpu.uuid, index=gpu.index)
        for piece, gpu in zip(part.slices, chosen, strict=True)
    )


def keep(
    lease: Lease, servers: Sequence[Server], used: Mapping[str, int], leases_on: LeasesOn
) -> Mapping[str, int]:
    """What is kept free for a parked lease that waits, by GPU uuid: where the fewest leases have to end."""
    kept: dict[str, int] = {}
    for part in _parts(lease):
        group = reservation.candidates(eligible(part, servers), used, leases_on)
        found = reservation.choose(group, len(part.slices))
        if found is not None:
            kept.update(reservation.blocked_mib(found[1]))
    return kept


def _parts(lease: Lease) -> list[Lease]:
    """The lease as it is on each of its servers."""
    slices: dict[str, list[Slice]] = {}
    for piece in lease.slices:
        slices.setdefault(piece.server, []).append(piece)
    if len(slices) == 1:
        return [lease]
    return [replace(lease, slices=tuple(pieces)) for pieces in slices.values()]


def _model(piece: Slice) -> tuple[str, int, bool]:
    return piece.name, piece.total_mib, piece.emulated
