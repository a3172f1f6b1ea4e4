"""Points in time and durations as text for people."""

from __future__ import annotations

from datetime import datetime, timezone

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def format_time(at: float) -> str:
    """Format seconds since the epoch in UTC, as ``"2026-01-31T12:00:00Z"``."""
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_duration(seconds: float) -> str:
    """Format a duration in at most two units: ``9000`` becomes ``"2 h 30 min"``."""
    left, parts = round(seconds), []
    for unit, size in _UNITS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
