"""Slices in Ray's units, and the units of a server's GPUs that others than the pool hold. Pure.

Ray counts GPUs in ten-thousandths. Of a server's GPUs it reports only the sum of the free units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

#: Ray's units in one GPU.
UNIT = 10_000
#: Less than this, in units, is Ray's rounding or a task of ours, not a share of somebody else.
_MAX_ROUNDING = 20


def units(memory_mib: int, total_mib: int) -> int:
    """Return a slice in Ray's units, rounded down, so that slices that fit a GPU together also fit it in Ray."""
    return max(1, math.floor(memory_mib * UNIT / total_mib))


def claimed(resources: Mapping[str, float], groups: Sequence[str]) -> int:
    """Return the units that placement groups (by id) hold, according to a server's free resources."""
    return round(sum(resources.get(f"GPU_group_{group}", 0.0) for group in groups) * UNIT)


def foreign(total: int, resources: Mapping[str, float], groups: Sequence[str]) -> int:
    """Return the units of ``total`` GPUs that are neither free nor held by these placement groups."""
    held = total * UNIT - round(resources.get("GPU", 0.0) * UNIT) - claimed(resources, groups)
    return held if held > _MAX_ROUNDING else 0


def assign(held: int, ours: Sequence[int]) -> list[int]:
    """Return how many of ``held`` foreign units each GPU most likely has: placed by best fit, as Ray does.

    ``ours``: the units that the pool holds of each GPU. Ray does not report the placement. If the guess is wrong, Ray
    refuses a slice, and the pool then counts that GPU as taken.
    """
    taken = [0] * len(ours)
    while held >= UNIT and any(not ours[i] and not taken[i] for i in range(len(ours))):
        index = next(i for i in range(len(ours)) if not ours[i] and not taken[i])
        taken[index] = UNIT
        held -= UNIT
    while held > 0:
        free = [UNIT - ours[i] - taken[i] for i in range(len(ours))]
        fitting = [i for i in range(len(ours)) if free[i] >= held]
        # Best fit, as Ray does it; what fits nowhere in one piece is several claims.
        index = (
            min(fitting, key=lambda i: free[i]) if fitting else max(range(len(ours)), key=lambda i: free[i])
        )
        if free[index] <= 0:
            break
        part = min(held, free[index])
        taken[index] += part
        held -= part
    return taken
