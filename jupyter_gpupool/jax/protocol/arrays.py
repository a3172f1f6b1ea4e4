"""Arrays as both ends send them with a call of a client's function: types and shapes, and the bytes of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .dtypes import nbytes_of, numpy_dtype


def packed(arrays: Sequence[Any]) -> tuple[list[Any], bytes]:
    """Return the types and the shapes of arrays, None for a token, and the bytes of all of them."""
    import numpy as np

    found = [None if x is None else np.asarray(x) for x in arrays]
    facts = [None if x is None else [str(x.dtype), list(x.shape)] for x in found]
    return facts, b"".join(x.tobytes() for x in found if x is not None)


def unpacked(facts: Any, data: Any) -> list[Any]:
    """Return the arrays that :func:`packed` has packed; ``data``: a buffer of their bytes.

    Raises TypeError, ValueError and KeyError for anything else.
    """
    import numpy as np

    elements = np.frombuffer(data, np.uint8)
    arrays: list[Any] = []
    start = 0
    for fact in facts:
        if fact is None:
            arrays.append(None)
            continue
        name, dims = fact
        if not all(type(n) is int and n >= 0 for n in dims):
            raise ValueError("no shape")
        end = start + nbytes_of(name, dims)
        arrays.append(elements[start:end].copy().view(numpy_dtype(name)).reshape(dims))  # aligned
        start = end
    if start != len(elements):
        raise ValueError("more bytes than the arrays have")
    return arrays
