"""Points in time and durations as text."""

from __future__ import annotations

import pytest

from jupyter_gpupool.core.durations import format_duration, format_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min"), (9000, "2 h 30 min"), (90061, "1 d 1 h"), (86401, "1 d 1 s")],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_times_are_in_utc() -> None:
    assert format_time(1769860800.9) == "2026-01-31T12:00:00Z"
