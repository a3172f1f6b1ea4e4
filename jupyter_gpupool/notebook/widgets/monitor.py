"""``jupyter_gpupool.Monitor()``: a live chart of the lease's and the pool's utilization."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
from traitlets import Dict, Int, List

from .poller import News
from .pool_widget import PoolWidget

_WIDTH, _HEIGHT = 480, 96


class Monitor(PoolWidget):
    """Live utilization of this notebook's lease and of the pool.

    ``samples`` contains the last ``kept`` samples, one a second, newest last. Each has ``time`` (seconds since the
    epoch); for the lease ``lease_busy`` (0 to 1), ``lease_used_mib`` and ``lease_mib`` (None while there is no lease);
    for the whole pool ``pool_busy`` and ``pool_granted`` (0 to 1), and ``waiting`` (requests in the queue).
    """

    samples = List(Dict(), help="Samples, newest last.")
    kept = Int(300, min=1, help="How many samples are kept, one a second.")

    def __init__(self, **kwargs: Any) -> None:
        self._chart = widgets.HTML()
        self._figures = widgets.HTML()
        super().__init__((self._chart, self._figures), **kwargs)

    def update_pool(self, news: News) -> None:
        super().update_pool(news)
        if news.pool is None:
            self._figures.value = html.escape(news.trouble)
            return
        self.samples = [*self.samples, sample(news)][-self.kept :]
        self._chart.value = chart(self.samples)
        self._figures.value = html.escape(figures(self.samples[-1]))


def sample(news: News) -> dict[str, Any]:
    """Return one sample of the pool's state."""
    assert news.pool is not None
    gpus = [gpu for server in news.pool["servers"] for gpu in server["gpus"]]
    mine = [
        s for gpu in gpus for s in gpu["slices"] if news.lease is not None and s["lease"] == news.lease.id
    ]
    has = bool(mine)
    whole = sum(gpu["memory_mib"] for gpu in gpus) or 1
    return {
        "time": news.time,
        "lease_busy": sum(s.get("busy", 0.0) for s in mine) / len(mine) if has else None,
        "lease_used_mib": sum(s["used_mib"] for s in mine) if has else None,
        "lease_mib": sum(s["memory_mib"] for s in mine) if has else None,
        "pool_busy": sum(gpu["busy"] for gpu in gpus) / len(gpus) if gpus else 0.0,
        "pool_granted": sum(gpu["granted_mib"] for gpu in gpus) / whole,
        "waiting": len(news.pool["queue"]),
    }


def figures(last: dict[str, Any]) -> str:
    """Return the newest sample in words, also for screen readers."""
    if last["lease_mib"] is None:
        lease = "This notebook has no GPU slices"
    else:
        used = f"{last['lease_used_mib']} of {last['lease_mib']} MiB used"
        lease = f"This notebook: {last['lease_busy']:.0%} busy, {used}"
    waiting = f", {last['waiting']} waiting" if last["waiting"] else ""
    return f"{lease}. Pool: {last['pool_busy']:.0%} busy, {last['pool_granted']:.0%} granted{waiting}."


def chart(samples: Sequence[dict[str, Any]]) -> str:
    """Return an SVG chart of the lease's and the pool's utilization, and of the lease's used memory."""
    full = [s["lease_used_mib"] / s["lease_mib"] if s["lease_mib"] else None for s in samples]
    lines = (
        ("lease busy", "#1976d2", "", [s["lease_busy"] for s in samples]),
        ("lease memory", "#1976d2", "4 3", full),
        ("pool busy", "#e65100", "", [s["pool_busy"] for s in samples]),
    )
    drawn = "".join(_line(values, colour, dash) for _, colour, dash, values in lines)
    legend = "".join(
        f'<tspan fill="{colour}" dx="10">{"┄" if dash else "─"} {name}</tspan>'
        for name, colour, dash, _ in lines
    )
    return (
        f'<svg role="img" aria-label="Utilization in the last {len(samples)} seconds" width="{_WIDTH}" '
        f'height="{_HEIGHT + 20}" viewBox="0 -2 {_WIDTH} {_HEIGHT + 22}">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="currentColor" stroke-opacity="0.3"/>'
        f'{drawn}<text y="{_HEIGHT + 15}" font-size="12">{legend}</text></svg>'
    )


def _line(values: Sequence[float | None], colour: str, dash: str) -> str:
    """Return polylines, with gaps where there is no value."""
    step = _WIDTH / max(1, len(values) - 1)
    pieces: list[list[str]] = [[]]
    for k, value in enumerate(values):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{k * step:.1f},{(1 - min(1.0, value)) * _HEIGHT:.1f}")
    style = f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}"'
    return "".join(f'<polyline {style} points="{" ".join(piece)}"/>' for piece in pieces if piece)
