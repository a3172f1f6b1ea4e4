"""What can be seen of a pool at one instant: read once for everybody, and narrowed to what each may see."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..pool.models import Lease
from ..pool.namespaces import Namespaces
from .picture import narrowed


class Sight:
    """The pool with its GPUs by their ids, as deltas name them, and its live leases, as administrators see them.

    What has not changed since ``before`` is the same object as there, so that who compares thousands of them, or
    narrows them, is done at once.
    """

    def __init__(
        self,
        said: Mapping[str, Any],
        leases: Sequence[Lease],
        namespaces: Namespaces,
        before: Sight | None = None,
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
        self, owner: str | None, before: Sight | None = None, seen: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The document as ``owner`` may see it, who saw ``before`` as ``seen``."""
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

    def _told(self, before: Sight | None) -> dict[str, dict[str, Any]]:
        if before is None:
            return {id: told_of(lease) for id, lease in self.leases.items()}
        leases = {}
        for id, lease in self.leases.items():
            told = before.document["leases"].get(id)
            if told is None or before.leases[id] is not lease:
                now = told_of(lease)
                told = told if told == now else now
            leases[id] = told
        return leases


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in ``old``: whole parts; of GPUs only the fields; None for what is gone."""
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


def told_of(lease: Lease) -> dict[str, Any]:
    """Without what changes all the time and interests nobody who watches."""
    data = lease.to_json()
    del data["heartbeat_at"]
    return data


def now() -> float:
    return round(time.time(), 1)
