"""The tables that %gpupool shows, in HTML and in plain text."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from jupyter_gpupool.core.models import Lease


class Table:
    """A heading, column titles and rows: HTML in a notebook, text in a terminal."""

    def __init__(self, heading: str, titles: Sequence[str] = (), rows: Sequence[Sequence[Any]] = ()) -> None:
        self.heading = heading
        self.titles = list(titles)
        self.rows = [[str(cell) for cell in row] for row in rows]

    def __repr__(self) -> str:
        if not self.rows:
            return self.heading
        widths = [max(len(row[k]) for row in [self.titles, *self.rows]) for k in range(len(self.titles))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
            for row in [self.titles, *self.rows]
        ]
        return "\n".join([self.heading, *lines])

    def _repr_html_(self) -> str:
        if not self.rows:
            return f"<p>{html.escape(self.heading)}</p>"
        head = "".join(f'<th scope="col">{html.escape(t)}</th>' for t in self.titles)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows
        )
        return (
            f"<table><caption>{html.escape(self.heading)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def of_pool(pool: dict[str, Any], mine: str | None) -> Table:
    """Return a row for every GPU: how much of it is free, and who holds the rest."""
    rows = []
    for server in pool["servers"]:
        for gpu in server["gpus"]:
            free = gpu["memory_mib"] - gpu["granted_mib"]
            slices = ", ".join(
                f"{'this notebook' if s['lease'] == mine else s['owner']} {s['memory_mib']} MiB"
                for s in gpu["slices"]
            )
            rows.append(
                [server["name"], gpu["index"], gpu["name"], gpu["memory_mib"], free, slices or "free"]
            )
    queue = len(pool["queue"])
    waiting = f", {queue} waiting" if queue else ""
    count = f"{len(rows)} GPU{'' if len(rows) == 1 else 's'}"
    return Table(f"{count}{waiting}", ["server", "GPU", "model", "MiB", "free MiB", "slices"], rows)


def of_lease(lease: Lease, used: dict[str, int], frameworks: Sequence[str] = ()) -> Table:
    """Return this notebook's lease. ``used`` is in bytes, by GPU UUID; ``frameworks``: what programs use it by."""
    if not lease.slices:
        return Table(f"Waiting for {asked(lease)}: position {lease.position} in the queue")
    age = time.time() - (lease.granted_at or time.time())
    rows = [
        [f"cuda:{k}", s.name, s.server, f"{used.get(s.gpu_uuid, 0) / 2**20:.0f}", s.memory_mib, s.total_mib]
        for k, s in enumerate(lease.slices)
    ]
    by = f", used by {', '.join(frameworks)}" if frameworks else ""
    heading = f"{lease.state.value.capitalize()} for {span(age)}{by}, lease {lease.id}"
    if lease.parked is not None:
        heading = f"Asleep for {span(time.time() - lease.parked.since)}, wakes by itself, lease {lease.id}"
        if lease.position is not None:
            heading = f"Waking: position {lease.position} in the queue, lease {lease.id}"
    return Table(heading, ["device", "model", "server", "used MiB", "slice MiB", "GPU MiB"], rows)


def of_history(leases: Sequence[Lease]) -> Table:
    """Return a row for every lease."""
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M", time.localtime(lease.created_at)),
            asked(lease),
            lease.state.value,
            span((lease.ended_at or time.time()) - lease.granted_at) if lease.granted_at else "",
            lease.reason,
        ]
        for lease in leases
    ]
    return Table(
        f"{len(rows)} leases, newest last",
        ["requested at", "GPU slices", "state", "held for", "why it ended"],
        rows,
    )


def asked(lease: Lease) -> str:
    """Return what was requested: ``2 × 0.8`` or ``1 × 4096 MiB``."""
    request = lease.request
    share = f"{request.memory_mib} MiB" if request.memory_mib else f"{request.partial or 1:g}"
    return f"{request.num_gpus} × {share}"


def span(seconds: float) -> str:
    """Return a duration: ``45 s``, ``12 min``, ``3 h 5 min``."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{int(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
