"""What the manifests of the webhook and of the controller have in common. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The user of docs/deploy/Containerfile. The Pods run as this one whatever the image says.
_UID = 10001


def labels(name: str) -> dict[str, str]:
    """Return the labels of a program's objects, which also select its Pods."""
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "gpupool"}


def named(version: str, kind: str, name: str, namespace: str, **fields: Any) -> dict[str, Any]:
    """Return an object of a namespace."""
    metadata = {"name": name, "namespace": namespace, "labels": labels(name)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


def container(
    name: str,
    image: str,
    volume: str,
    folder: str,
    env: Mapping[str, str] | None = None,
    read_only: bool = True,
    **fields: Any,
) -> dict[str, Any]:
    """Return a container without privileges. It reads the Pod's ``volume`` at ``folder``, and writes to /tmp.

    ``read_only``: it does not write to the volume.
    """
    return {
        "name": name,
        "image": image,
        **fields,
        "env": [{"name": key, "value": value} for key, value in {"HOME": "/tmp", **(env or {})}.items()],
        "resources": {
            "requests": {"cpu": "50m", "memory": "128Mi"},
            "limits": {"memory": "256Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": volume, "mountPath": folder, "readOnly": read_only},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def of_secret(name: str) -> dict[str, Any]:
    """Return the source of a volume with a Secret's files."""
    return {"secret": {"secretName": name, "defaultMode": 0o440}}


def pod(
    account: str, program: dict[str, Any], volume: str, source: dict[str, Any], **fields: Any
) -> dict[str, Any]:
    """Return the specification of a Pod with one container, whose ``volume`` has that source."""
    return {
        "serviceAccountName": account,
        "enableServiceLinks": False,
        **fields,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _UID,
            "runAsGroup": _UID,
            "fsGroup": _UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [program],
        "volumes": [
            {"name": volume, **source},
            {"name": "tmp", "emptyDir": {"sizeLimit": "16Mi"}},
        ],
    }
