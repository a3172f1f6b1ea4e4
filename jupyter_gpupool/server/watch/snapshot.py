"""The pool at one instant, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core.models import Lease, LeaseState, Server, Snapshot, WorkerUsage
from jupyter_gpupool.pool.tenancy.namespaces import Namespaces
from jupyter_gpupool.pool.usage_history import Use, short_id


def pool_snapshot(
    snapshot: Snapshot,
    usage: Mapping[str, WorkerUsage],
    owner: str | None,
    namespaces: Namespaces,
    healthy: bool = True,
) -> dict[str, Any]:
    """Return the pool as ``owner`` (None: an administrator) may see it (see docs/reference/http.md).

    Other holders stay unnamed, unless their namespace names holders to its members. ``usage`` is what each worker uses,
    by lease id; ``healthy``: no health check fails.
    """
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
                    "overhead_mib": account.overhead_bytes.get(piece.gpu_uuid, 0) >> 20 if account else 0,
                    "busy": round(share, 2),
                    "frameworks": list(account.frameworks) if account else [],
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
    """Return a GPU of an administrator's snapshot as ``owner`` may see it."""
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


def forecast_json(lease: Lease) -> dict[str, Any]:
    """Return the forecast of a request that can be granted now or later."""
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
    """Return the sample of each GPU, by its uuid, for the chart of utilization."""
    used: dict[str, int] = {}
    busy: dict[str, dict[str, float]] = {}
    for lease_id, account in usage.items():
        for uuid, allocated in account.allocated_bytes.items():
            used[uuid] = used.get(uuid, 0) + allocated
        for uuid, share in account.busy.items():
            if share:
                busy.setdefault(uuid, {})[short_id(lease_id)] = share
    return {
        gpu.uuid: Use(
            gpu.memory_mib,
            granted_mib.get(gpu.uuid, 0),
            used.get(gpu.uuid, 0) >> 20,
            round(min(1.0, sum(busy.get(gpu.uuid, {}).values())), 2),
            busy.get(gpu.uuid, {}),
        )
        for server in servers
        for gpu in server.gpus
    }
