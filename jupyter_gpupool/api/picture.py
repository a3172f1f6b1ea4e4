"""The pool at one instant, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import __version__
from ..pool.history import Use
from ..pool.models import Lease, LeaseState, Server, Snapshot, WorkerUsage
from ..pool.namespaces import Namespaces


def picture(
    snapshot: Snapshot,
    usage: Mapping[str, WorkerUsage],
    owner: str | None,
    namespaces: Namespaces,
    healthy: bool = True,
) -> dict[str, Any]:
    """The pool (see docs/architecture.md); holders other than ``owner`` unless None stay unnamed, but for those whom
    a namespace names to its members. ``usage`` is what workers say, by lease id; ``healthy``: nothing that was
    looked at fails."""
    slices: dict[str, list[dict[str, Any]]] = {}
    used: dict[str, int] = {}
    busy: dict[str, float] = {}
    for lease in snapshot.leases:
        account = usage.get(lease.id)
        for piece in lease.slices:
            allocated = account.allocated_bytes.get(piece.gpu_uuid, 0) if account else 0
            used[piece.gpu_uuid] = used.get(piece.gpu_uuid, 0) + allocated
            share = account.busy.get(piece.gpu_uuid, 0.0) if account else 0.0
            busy[piece.gpu_uuid] = min(1.0, busy.get(piece.gpu_uuid, 0.0) + share)
            slices.setdefault(piece.gpu_uuid, []).append(
                {
                    "lease": lease.id,
                    "owner": lease.request.owner,
                    "label": lease.request.label,
                    "memory_mib": piece.memory_mib,
                    "used_mib": allocated >> 20,
                    "busy": round(share, 2),
                    "state": lease.state.value,
                }
            )
    leases = {lease.id: lease for lease in snapshot.leases}
    servers = [
        {
            "name": server.name,
            "host": server.host,
            "draining": server.draining,
            "gpus": [
                narrowed(
                    {
                        **vars(gpu),
                        "granted_mib": snapshot.granted_mib.get(gpu.uuid, 0),
                        "used_mib": used.get(gpu.uuid, 0) >> 20,
                        "busy": round(busy.get(gpu.uuid, 0.0), 2),
                        "slices": slices.get(gpu.uuid, []),
                    },
                    leases,
                    owner,
                    namespaces,
                )
                for gpu in server.gpus
            ],
        }
        for server in snapshot.servers
    ]
    queue = [lease.id if namespaces.manages(owner, lease) else None for lease in snapshot.queue]
    return {"version": __version__, "servers": servers, "queue": queue, "healthy": healthy}


def narrowed(
    gpu: dict[str, Any], leases: Mapping[str, Lease], owner: str | None, namespaces: Namespaces
) -> dict[str, Any]:
    """A GPU of an administrator's picture as ``owner`` may see it."""
    if owner is None:
        return gpu
    slices = []
    for piece in gpu["slices"]:
        lease = leases[piece["lease"]]
        if not namespaces.sees_holder(owner, lease):
            piece = {**piece, "lease": None, "owner": None, "label": ""}
        elif not namespaces.manages(owner, lease):
            piece = {**piece, "label": ""}
        slices.append(piece)
    return {**gpu, "slices": slices}


def foreseen(lease: Lease) -> dict[str, Any]:
    """What a forecast says of a request that could be met one day."""
    outcome = "queued" if lease.state is LeaseState.QUEUED else "granted"
    return {
        "outcome": outcome,
        "position": lease.position,
        "reason": lease.waits_for,
        "slices": lease.to_json()["slices"],
    }


def uses(
    servers: Iterable[Server], granted_mib: Mapping[str, int], usage: Mapping[str, WorkerUsage]
) -> dict[str, Use]:
    """What the pool's chart is drawn from, by GPU uuid."""
    used: dict[str, int] = {}
    busy: dict[str, float] = {}
    for account in usage.values():
        for uuid, allocated in account.allocated_bytes.items():
            used[uuid] = used.get(uuid, 0) + allocated
        for uuid, share in account.busy.items():
            busy[uuid] = min(1.0, busy.get(uuid, 0.0) + share)
    return {
        gpu.uuid: Use(
            gpu.memory_mib,
            granted_mib.get(gpu.uuid, 0),
            used.get(gpu.uuid, 0) >> 20,
            round(busy.get(gpu.uuid, 0.0), 2),
        )
        for server in servers
        for gpu in server.gpus
    }
