"""A pool at one instant: read once for all watchers, and narrowed to what each may see."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.pool.tenancy.namespaces import Namespaces

from .snapshot import narrowed


class VisiblePool:
    """The pool as an administrator sees it: its GPUs and its live leases by id, as deltas name them.

    Whatever has not changed since ``before`` is the same object as there, so that comparing and narrowing thousands
    of them is quick.
    """

    def __init__(
        self,
        said: Mapping[str, Any],
        leases: Sequence[Lease],
        namespaces: Namespaces,
        before: VisiblePool | None = None,
    ) -> None:
        self.namespaces = namespaces
        self.rights = namespaces.version
        self.leases = {lease.id: lease for lease in leases}
        self.by_owner: dict[str, list[str]] = {}
        self.by_namespace: dict[str, list[str]] = {}
        for lease in leases:
            self.by_owner.setdefault(lease.request.owner, []).append(lease.id)
            self.by_namespace.setdefault(lease.request.namespace, []).append(lease.id)
        servers = said["servers"]
        self.document: dict[str, Any] = {
            "servers": [{**server, "gpus": [gpu["uuid"] for gpu in server["gpus"]]} for server in servers],
            "gpus": self._gpus(servers, before.document["gpus"] if before else {}),
            "leases": self._told(before),
            "queue": said["queue"],
            "healthy": said["healthy"],
        }

    def narrow(
        self, owner: str | None, before: VisiblePool | None = None, seen: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the document as ``owner`` may see it. ``seen`` is what the owner saw of ``before``."""
        if owner is None:
            return self.document
        if before is not None and before.rights != self.rights:
            before = None
        known = before.document["gpus"] if before and seen else {}
        had = seen["gpus"] if before and seen else {}
        gpus = {
            uuid: had[uuid] if known.get(uuid) is gpu else narrowed(gpu, self.leases, owner, self.namespaces)
            for uuid, gpu in self.document["gpus"].items()
        }
        managed = [id for name in self.namespaces.managed(owner) for id in self.by_namespace.get(name, ())]
        ids = dict.fromkeys([*self.by_owner.get(owner, ()), *managed])
        told = self.document["leases"]
        queue = [id if id in ids else None for id in self.document["queue"]]
        return {**self.document, "gpus": gpus, "leases": {id: told[id] for id in ids}, "queue": queue}

    @staticmethod
    def _gpus(servers: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
        gpus = {}
        for server in servers:
            for gpu in server["gpus"]:
                known = before.get(gpu["uuid"])
                gpus[gpu["uuid"]] = known if known == gpu else gpu
        return gpus

    def _told(self, before: VisiblePool | None) -> dict[str, dict[str, Any]]:
        if before is None:
            return {id: lease_json(lease) for id, lease in self.leases.items()}
        leases = {}
        for id, lease in self.leases.items():
            told = before.document["leases"].get(id)
            if told is None or before.leases[id] is not lease:
                now = lease_json(lease)
                told = told if told == now else now
            leases[id] = told
        return leases


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changed from ``old`` to ``new``: whole parts, of GPUs only the fields, None for what is gone."""
    changes: dict[str, Any] = {
        part: new[part] for part in ("servers", "queue", "healthy") if old[part] != new[part]
    }
    for part in ("gpus", "leases"):
        found: dict[str, Any] = dict.fromkeys(old[part].keys() - new[part].keys())
        for key, value in new[part].items():
            before = old[part].get(key)
            if before is value or before == value:
                continue
            if before is None or part == "leases":
                found[key] = value
            else:
                found[key] = {k: v for k, v in value.items() if k not in before or before[k] != v}
        if found:
            changes[part] = found
    return changes


def lease_json(lease: Lease) -> dict[str, Any]:
    """Return a lease as JSON, without its heartbeat, which changes all the time."""
    data = lease.to_json()
    del data["heartbeat_at"]
    return data


def now() -> float:
    """Return the time in seconds since the epoch, to a tenth."""
    return round(time.time(), 1)
