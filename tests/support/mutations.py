"""Changes to what is read from a network, at random places: what no real sender says, close to what one does."""

from __future__ import annotations

import random
from typing import Any

#: Values at the edges of what a field may have, and far beyond them.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, -2, -4096, 127, 128, 255, 256, 4095, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, -(2**63), 2**64 - 1),
    *(0.0, -0.0, 0.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "float32", "\0", "../../etc/passwd", "x" * 300, b"", b"x", bytes(16), b"\xff" * 300),
    *([], {}, [[]], [0], [None], [[0], [1], 0, "float32", 0], {"op": ""}, {"": []}),
)


def mutated(rng: random.Random, value: Any, others: tuple[Any, ...] = ()) -> Any:
    """A copy of a tree of plain values with one change somewhere. ``others``: values of the field's own to put in."""
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.85:
        copy = list(value)
        place = rng.randrange(len(copy))
        how = rng.randrange(12)
        if how == 0:
            del copy[place]
        elif how == 1:
            copy.insert(place, copy[rng.randrange(len(copy))])
        elif how == 2:
            other = rng.randrange(len(copy))
            copy[place], copy[other] = copy[other], copy[place]
        elif how == 3:
            copy[place:] = copy[place : place + rng.randrange(3)]
        else:
            copy[place] = mutated(rng, copy[place], others)
        return copy
    if isinstance(value, dict) and value and rng.random() < 0.85:
        changed = dict(value)
        key = rng.choice(list(changed))
        if rng.randrange(8) == 0:
            del changed[key]
        else:
            changed[key] = mutated(rng, changed[key], others)
        return changed
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2, 8, 64, -value - value))
    if isinstance(value, bytes) and value and rng.random() < 0.5:
        return damaged(rng, value)
    return rng.choice(others) if others and rng.random() < 0.3 else rng.choice(STRANGE)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some of them changed, left out or doubled. ``data`` is not empty."""
    copy = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(copy)) if copy else 0
        how = rng.randrange(6)
        if not copy or how == 0:
            copy[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif how == 1:
            del copy[place : place + rng.randint(1, 9)]
        elif how == 2:
            copy[place] = rng.randrange(256)
        else:
            copy[place] ^= 1 << rng.randrange(8)
    return bytes(copy)
