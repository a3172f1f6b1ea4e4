"""Every metric of a pool, from the registry of a pool's server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from jupyter_gpupool.server.http.metrics import ServerFigures

from .text import table


def markdown() -> str:
    rows = []
    for metric, labels in collectors():
        suffix = "_total" if metric.type == "counter" else ""
        rows.append(
            (
                f"`{metric.name}{suffix}`",
                metric.type,
                ", ".join(f"`{x}`" for x in labels),
                metric.documentation,
            )
        )
    return table(["metric", "kind", "labels", "meaning"], rows)


def collectors() -> list[tuple[Any, tuple[str, ...]]]:
    """Each metric and its labels, of a server that serves over TLS and so has every one of them."""
    service: Any = SimpleNamespace(
        engine=SimpleNamespace(certfile="server.crt"),
        thread=SimpleNamespace(),
        listen=lambda callback: None,
        on_resumed=lambda callback: None,
        on_moved=lambda callback: None,
    )
    registry = ServerFigures(service).registry
    # The registry has no public list of its collectors; what it collects does not name labels without values.
    return [
        (metric, collector._labelnames)
        for collector in registry._collector_to_names
        for metric in collector.describe()
    ]
