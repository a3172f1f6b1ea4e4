"""The types of elements, by NumPy's names, with PJRT's numbers for them and their bytes."""

from __future__ import annotations

from typing import Any

#: PJRT's number and the bytes of an element. Types of less than a byte are not served yet.
DTYPES: dict[str, tuple[int, int]] = {
    "bool": (1, 1),
    "int8": (2, 1),
    "int16": (3, 2),
    "int32": (4, 4),
    "int64": (5, 8),
    "uint8": (6, 1),
    "uint16": (7, 2),
    "uint32": (8, 4),
    "uint64": (9, 8),
    "float16": (10, 2),
    "float32": (11, 4),
    "float64": (12, 8),
    "bfloat16": (13, 2),
    "complex64": (14, 8),
    "complex128": (15, 16),
    "float8_e5m2": (16, 1),
    "float8_e4m3fn": (17, 1),
    "float8_e4m3b11fnuz": (18, 1),
    "float8_e5m2fnuz": (19, 1),
    "float8_e4m3fnuz": (20, 1),
    "float8_e4m3": (26, 1),
    "float8_e3m4": (27, 1),
    "float8_e8m0fnu": (28, 1),
}

#: What a program may return: also what stands for the order of its effects, and has no elements.
TOKEN = "token"
OUTPUTS = {**DTYPES, TOKEN: (23, 0)}

#: The names by PJRT's number.
NAMES = {number: name for name, (number, _) in DTYPES.items()}


def nbytes_of(dtype: str, dims: list[int] | tuple[int, ...]) -> int:
    """Return the bytes of an array's elements. Raises KeyError for an unknown type."""
    count = OUTPUTS[dtype][1]
    for length in dims:
        count *= length
    return count


def numpy_dtype(name: str) -> Any:
    """Return NumPy's dtype of a name. Raises AttributeError for an unknown one."""
    import numpy as np

    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
