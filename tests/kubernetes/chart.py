"""The chart of docs/deployments/kubernetes, rendered by Helm's own code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "docs" / "deployments" / "kubernetes" / "chart"
NAMESPACE = "gpupool-system"

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this platform")


@functools.cache
def _loaded() -> Any:
    return helm.Chart.load(CHART)


def rendered(values: dict[str, Any], namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """Return the objects that Helm would create. Raises HelmError."""
    files = _loaded().render(values, name="gpupool", namespace=namespace)
    manifests = [text for name, text in files.items() if name.endswith(".yaml")]
    return [one for text in manifests for one in yaml.safe_load_all(text) if one]
