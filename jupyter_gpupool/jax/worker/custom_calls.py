"""The functions outside of it that a program calls: read from a HloModuleProto, with the arrays that each gets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jupyter_gpupool.jax.protocol.dtypes import TOKEN
from jupyter_gpupool.jax.protocol.protobuf import fields, numbers

#: The element types by their numbers in XLA; others have their number as a name.
_TYPES = {
    **{1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64"},
    **{6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64"},
    **{
        10: "float16",
        11: "float32",
        12: "float64",
        15: "complex64",
        16: "bfloat16",
        17: TOKEN,
        18: "complex128",
    },
    **{19: "float8_e5m2", 20: "float8_e4m3fn", 23: "float8_e4m3b11fnuz", 24: "float8_e5m2fnuz"},
    **{25: "float8_e4m3fnuz", 28: "float8_e4m3", 29: "float8_e3m4", 33: "float8_e8m0fnu"},
}
_TUPLE = 13

_ATTRIBUTE = r"\w+ = (?:true|false|-?\d+ : \w+)"
_ATTRIBUTES = re.compile(rf"\{{(?:{_ATTRIBUTE}(?:, {_ATTRIBUTE})*)?\}}|")
_PAIR = re.compile(r"(\w+) = (true|false|-?\d+)")
_WORDS = {"true": "1", "false": "0"}


@dataclass(frozen=True)
class Array:
    """The type and the shape of an array."""

    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class CustomCall:
    """``version``: of the way of calling, 4 for XLA's FFI. ``attributes``: None if they are not plain numbers.

    ``shared``: for each result that takes an operand's memory, the numbers of both.
    """

    target: str
    version: int
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    attributes: Mapping[str, int] | None
    shared: tuple[tuple[int, int], ...] = ()


def custom_calls(module: bytes) -> Iterator[CustomCall]:
    """Return the custom calls of a HloModuleProto. Raises KeyError for an operand that is not in its computation."""
    for computation in fields(module, 3):
        instructions = fields(computation, 2)
        if not any(fields(one, 2) == [b"custom-call"] for one in instructions):
            continue
        shapes = {sum(numbers(one, 35)): fields(one, 3)[0] for one in instructions}
        for one in instructions:
            if fields(one, 2) == [b"custom-call"]:
                yield CustomCall(
                    b"".join(fields(one, 28)).decode("utf-8", "replace"),
                    sum(numbers(one, 77)),
                    tuple(array for id in numbers(one, 36) for array in _arrays(shapes[id])),
                    tuple(_arrays(fields(one, 3)[0])),
                    _attributes(b"".join(fields(one, 43))),
                    tuple(_shared(alias) for alias in fields(one, 74)),
                )


def _arrays(shape: bytes) -> Iterator[Array]:
    kind = sum(numbers(shape, 2))
    if kind == _TUPLE:
        for part in fields(shape, 4):
            yield from _arrays(part)
    else:
        dtype = _TYPES.get(kind, str(kind))
        if any(numbers(shape, 6)):
            dtype = f"dynamic {dtype}"
        yield Array(dtype, tuple(numbers(shape, 3)))


def _attributes(text: bytes) -> Mapping[str, int] | None:
    written = text.decode("utf-8", "replace")
    if not _ATTRIBUTES.fullmatch(written):
        return None
    pairs = [(name, int(_WORDS.get(value, value))) for name, value in _PAIR.findall(written)]
    return dict(pairs) if len(dict(pairs)) == len(pairs) else None


def _shared(alias: bytes) -> tuple[int, int]:
    return sum(numbers(alias, 1)), sum(numbers(alias, 2))
