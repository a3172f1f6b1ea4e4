"""A lease in the words of `gpupool leases`, which whoever else lists leases uses, too. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .models import Lease


@dataclass(frozen=True)
class LeaseWords:
    """The columns of a lease. ``memory``: MiB of each GPU, or what was asked for; ``since``: seconds since the epoch.

    ``torch``: the release of PyTorch that it computes with, and its environment if that is not the pool's own.
    ``label``: what it is for, and why it is in its state.
    """

    state: str
    gpus: str
    memory: str
    torch: str
    since: float
    label: str


def lease_words(lease: Lease) -> LeaseWords:
    """Return what is said of the lease."""
    state = lease.state.value if lease.position is None else f"{lease.state.value} #{lease.position}"
    if lease.slices:
        memory = memory_of(lease)
        gpus = gpus_of(lease)
    else:
        request = lease.request
        memory = str(request.memory_mib) if request.memory_mib else f"{request.partial:.0%} of each"
        gpus = f"{request.num_gpus} requested"
    why = lease.reason or lease.waits_for
    label = lease.request.label + (f" ({why})" if why else "")
    return LeaseWords(state, gpus, memory, _torch(lease), lease.granted_at or lease.created_at, label)


def gpus_of(lease: Lease) -> str:
    """Return the GPUs that a lease has slices of: ``0 1 of gpu-1``."""
    servers = dict.fromkeys(piece.server for piece in lease.slices)
    return ", ".join(
        " ".join(str(piece.index) for piece in lease.slices if piece.server == server) + f" of {server}"
        for server in servers
    )


def memory_of(lease: Lease) -> str:
    """Return the MiB of each GPU that a lease has: ``26008``, or ``26008/13004`` where they differ."""
    return "/".join(dict.fromkeys(str(piece.memory_mib) for piece in lease.slices))


def _torch(lease: Lease) -> str:
    worker = lease.worker
    if worker is None or not worker.torch:
        return "-"
    return worker.torch if worker.environment == "default" else f"{worker.torch} ({worker.environment})"
