"""The custom resources by which kubectl shows the pool: a Slice for each lease of a Pod, and GPUServers. Pure."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from jupyter_gpupool.core.lease_words import lease_words
from jupyter_gpupool.core.models import Lease

from .names import DOMAIN

VERSION = "v1alpha1"
API_VERSION = f"{DOMAIN}/{VERSION}"
#: What the API server calls the lists.
SLICES, SERVERS = "slices", "gpuservers"
#: Label of a Slice: the uid of its Pod.
POD_UID = f"{DOMAIN}/pod-uid"
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def slice_of(lease: Lease, pod: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Slice that shows a Pod's lease. It belongs to the Pod, so that it goes with it."""
    words, of = lease_words(lease), pod["metadata"]
    owner = {"apiVersion": "v1", "kind": "Pod", "name": of["name"], "uid": of["uid"]}
    status: dict[str, Any] = {
        "state": lease.state.value,
        "shown": words.state,
        "gpus": words.gpus,
        "memoryMiB": words.memory,
        "pytorch": words.torch,
        "since": _time(words.since),
        "owner": lease.request.owner,
        "label": words.label,
        "slices": [
            {
                "server": piece.server,
                "gpu": piece.gpu_uuid,
                "index": piece.index,
                "memoryMiB": piece.memory_mib,
            }
            for piece in lease.slices
        ],
    }
    if lease.position is not None:
        status["place"] = lease.position
    if lease.expires_at is not None:
        status["ends"] = _time(lease.expires_at)
    return {
        "apiVersion": API_VERSION,
        "kind": "Slice",
        "metadata": {
            "name": lease.id,
            "namespace": of["namespace"],
            "labels": {POD_UID: of["uid"]},
            "ownerReferences": [owner],
        },
        "spec": {"lease": lease.id, "pod": of["name"]},
        "status": _without_blanks(status),
    }


def server_of(server: Mapping[str, Any]) -> dict[str, Any]:
    """Return the GPUServer that shows a server of the answer to ``GET pool``."""
    gpus = server["gpus"]
    if server["draining"]:
        state = "Draining"
    else:
        state = "Ready" if all(gpu["healthy"] for gpu in gpus) else "Unhealthy"
    return {
        "apiVersion": API_VERSION,
        "kind": "GPUServer",
        "metadata": {"name": _server_name(str(server["name"]))},
        "spec": {"server": server["name"]},
        "status": _without_blanks(
            {
                "state": state,
                "host": server["host"],
                "count": len(gpus),
                "model": ", ".join(dict.fromkeys(gpu["name"] for gpu in gpus)),
                "memoryMiB": sum(gpu["memory_mib"] for gpu in gpus),
                "grantedMiB": sum(gpu["granted_mib"] for gpu in gpus),
                "gpus": [
                    {
                        "uuid": gpu["uuid"],
                        "index": gpu["index"],
                        "memoryMiB": gpu["memory_mib"],
                        "grantedMiB": gpu["granted_mib"],
                        "trouble": gpu["trouble"],
                    }
                    for gpu in gpus
                ],
            }
        ),
    }


def is_shown(present: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Return whether an object of the API server says what is wanted."""
    return present is not None and all(present.get(part) == wanted[part] for part in ("spec", "status"))


def definitions() -> list[dict[str, Any]]:
    """Return the CustomResourceDefinitions."""
    return [
        _definition(
            "Slice",
            SLICES,
            "Namespaced",
            {"lease": _TEXT, "pod": _TEXT},
            {
                "state": _TEXT,
                "shown": _TEXT,
                "place": _NUMBER,
                "gpus": _TEXT,
                "memoryMiB": _TEXT,
                "pytorch": _TEXT,
                "since": _TIME,
                "ends": _TIME,
                "owner": _TEXT,
                "label": _TEXT,
                "slices": _list(server=_TEXT, gpu=_TEXT, index=_NUMBER, memoryMiB=_NUMBER),
            },
            [
                ("State", "string", ".status.shown"),
                ("GPUs", "string", ".status.gpus"),
                ("MiB", "string", ".status.memoryMiB"),
                ("PyTorch", "string", ".status.pytorch"),
                ("Since", "date", ".status.since"),
                ("Ends", "string", ".status.ends"),
                ("Owner", "string", ".status.owner"),
                ("Label", "string", ".status.label"),
                ("Pod", "string", ".spec.pod"),
            ],
        ),
        _definition(
            "GPUServer",
            SERVERS,
            "Cluster",
            {"server": _TEXT},
            {
                "state": _TEXT,
                "host": _TEXT,
                "count": _NUMBER,
                "model": _TEXT,
                "memoryMiB": _NUMBER,
                "grantedMiB": _NUMBER,
                "gpus": _list(
                    uuid=_TEXT, index=_NUMBER, memoryMiB=_NUMBER, grantedMiB=_NUMBER, trouble=_TEXT
                ),
            },
            [
                ("State", "string", ".status.state"),
                ("GPUs", "integer", ".status.count"),
                ("Model", "string", ".status.model"),
                ("MiB", "integer", ".status.memoryMiB"),
                ("Granted", "integer", ".status.grantedMiB"),
                ("Host", "string", ".status.host"),
            ],
        ),
    ]


_TEXT, _NUMBER = {"type": "string"}, {"type": "integer", "format": "int64"}
_TIME = {"type": "string", "format": "date-time"}


def _list(**fields: dict[str, str]) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "object", "properties": fields}}


def _definition(
    kind: str,
    plural: str,
    scope: str,
    spec: Mapping[str, Any],
    status: Mapping[str, Any],
    columns: list[tuple[str, str, str]],
) -> dict[str, Any]:
    parts = {"spec": spec, "status": status}
    properties = {name: {"type": "object", "properties": dict(fields)} for name, fields in parts.items()}
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": properties}},
        "additionalPrinterColumns": [
            {"name": name, "type": of, "jsonPath": path} for name, of, path in columns
        ],
    }
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{DOMAIN}"},
        "spec": {"group": DOMAIN, "names": names, "scope": scope, "versions": [version]},
    }


def _server_name(name: str) -> str:
    """Return a server's name if an object may have it, else what is like it and no other server's."""
    if len(name) <= 200 and _DNS_NAME.fullmatch(name):
        return name
    like = re.sub(r"[^a-z0-9]+", "-", name.lower())[:100].strip("-")
    return f"{like or 'server'}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _without_blanks(value: Any) -> Any:
    """Return JSON without fields that are empty text or null: API servers of 1.20 take such text in a list for null."""
    if isinstance(value, Mapping):
        return {name: _without_blanks(inner) for name, inner in value.items() if inner not in ("", None)}
    return [_without_blanks(inner) for inner in value] if isinstance(value, list) else value


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
