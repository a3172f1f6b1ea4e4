"""What slices are in Ray's terms, and what others than the pool hold of a server's GPUs. Pure.

Ray counts GPUs in ten-thousandths and says of a server only how much is free of all its GPUs together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

#: Ray's own unit, as a part of a GPU.
UNIT = 10_000
#: Others that seem to hold less than this, in units, are Ray's roundings, or a question of ours on its way.
_NOTHING = 20


def units(memory_mib: int, total_mib: int) -> int:
    """A slice in Ray's units, rounded down: slices that fit a GPU together fit it in Ray, too."""
    return max(1, math.floor(memory_mib * UNIT / total_mib))


def claimed(resources: Mapping[str, float], groups: Sequence[str]) -> int:
    """The units that those placement groups (by their ids) hold, according to a server's free resources."""
    return round(sum(resources.get(f"GPU_group_{group}", 0.0) for group in groups) * UNIT)


def foreign(total: int, resources: Mapping[str, float], groups: Sequence[str]) -> int:
    """The units of ``total`` GPUs that are neither free nor held by those placement groups."""
    held = total * UNIT - round(resources.get("GPU", 0.0) * UNIT) - claimed(resources, groups)
    return held if held > _NOTHING else 0


def assign(held: int, ours: Sequence[int]) -> list[int]:
    """Which GPUs ``held`` foreign units are most likely on, by index, as Ray would have placed them.

    ``ours`` are the units that the pool holds of each. Ray does not say; where this is wrong, it will
    refuse a slice, and then more is known.
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
