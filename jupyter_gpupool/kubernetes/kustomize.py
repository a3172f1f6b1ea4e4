"""Manifests as a kustomize base: a file for each object, and the list of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.files import write_atomically

from .manifests import as_yaml

LIST = "kustomization.yaml"


def write_base(folder: Path, objects: list[dict[str, Any]]) -> list[Path]:
    """Write the objects into a directory, which may hold a former base; return the files. Raises PoolError."""
    names = {f"{one['kind'].lower()}-{one['metadata']['name']}.yaml": one for one in objects}
    assert len(names) == len(objects), "two objects of one kind and name"
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(names),
    }
    files = {**{name: [one] for name, one in names.items()}, LIST: [kustomization]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            secret = any(one["kind"] == "Secret" for one in content)
            write_atomically(folder / name, as_yaml(content), 0o600 if secret else 0o644)
    except OSError as e:
        raise PoolError(f"the manifests cannot be written to {folder}: {e.strerror or e}") from None
    return [folder / name for name in files]
