"""Measures the connection to an attached slice as programs use it: by reading a value, and by copies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Each measurement is repeated at least so often.
_MIN_REPEATS = 3
_MAX_ROUND_TRIPS = 2000


@dataclass(frozen=True)
class Measured:
    """Round trips in seconds, rates in bytes per second, and ``size``, the bytes of a copy; without the first."""

    round_trips: tuple[float, ...]
    to_device: float
    from_device: float
    size: int

    def round_trip(self, share: float) -> float:
        """The time in seconds that ``share`` (0 to 1) of the round trips did not exceed."""
        return quantile(self.round_trips, share)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` (0 to 1) of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def measure(device: str, size: int, seconds: float) -> Measured:
    """Measure ``device`` with copies of ``size`` bytes, for about ``seconds`` for each figure."""
    count = max(1, size // 4)
    host = torch.ones(count)
    there = torch.empty(count, device=device)
    there.copy_(host)
    float(there[0])  # so that nothing below is the first call
    trips: list[float] = []
    began = time.perf_counter()
    # Reading a value is one command to the worker and one answer.
    while len(trips) < _MIN_REPEATS or (
        len(trips) < _MAX_ROUND_TRIPS and time.perf_counter() - began < seconds
    ):
        start = time.perf_counter()
        float(there[0])
        trips.append(time.perf_counter() - start)

    def to_device() -> None:
        there.copy_(host)
        float(there[-1])

    return Measured(
        tuple(trips),
        _rate(to_device, count * 4, seconds),
        _rate(lambda: there.cpu(), count * 4, seconds),
        count * 4,
    )


def _rate(copy: Callable[[], object], size: int, seconds: float) -> float:
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < _MIN_REPEATS or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        copy()
        taken.append(time.perf_counter() - start)
    return size / quantile(taken, 0.5)
