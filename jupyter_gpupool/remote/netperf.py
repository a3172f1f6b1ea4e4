"""How fast the way to an attached slice is, measured as programs use it: by an operator that is waited for, and by
copies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: So many times at least, whatever time there is.
_LEAST = 3
_MOST_ROUND_TRIPS = 2000


@dataclass(frozen=True)
class Measured:
    """Times in seconds, bandwidths in bytes a second, ``size`` of a copy in bytes; both without what came first."""

    round_trips: tuple[float, ...]
    to_device: float
    from_device: float
    size: int

    def round_trip(self, share: float) -> float:
        """The time within which that share of the round trips was done."""
        return quantile(self.round_trips, share)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that ``share`` (0 to 1) of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def measure(device: str, size: int, seconds: float) -> Measured:
    """Of a device of this process, for about ``seconds`` each way. It needs ``size`` bytes there."""
    count = max(1, size // 4)
    host = torch.ones(count)
    there = torch.empty(count, device=device)
    there.copy_(host)
    float(there[0])  # whatever is done once is done
    trips: list[float] = []
    began = time.perf_counter()
    # Looked at by item(): a record there, a value back.
    while len(trips) < _LEAST or (len(trips) < _MOST_ROUND_TRIPS and time.perf_counter() - began < seconds):
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
    while len(taken) < _LEAST or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        copy()
        taken.append(time.perf_counter() - start)
    return size / quantile(taken, 0.5)
