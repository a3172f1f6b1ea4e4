"""Dataclasses as lists of plain values, which msgpack carries; each value is checked when it is read back."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A dataclass as the list of its fields, and so everything within it."""
    if dataclasses.is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def checked(kind: type[T], value: Any) -> T:
    """The dataclass that :func:`plain` turned into ``value``. Raises ValueError for anything else.

    Fields are of type int, float, bool, str, bytes, Any, another dataclass, a tuple of as many or of any number of
    values of these types, or one of these types or None.
    """
    found: T = _checked(kind, value, kind.__name__)
    return found


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _checked(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        hints = _types(typing.cast(type, kind))
        if not isinstance(value, list) or len(value) != len(hints):
            raise ValueError(f"{where}: {value!r:.80} does not have the {len(hints)} fields of it")
        return typing.cast(type, kind)(
            *(_checked(hint, v, f"{where}.{name}") for (name, hint), v in zip(hints.items(), value))
        )
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (wanted,) = (a for a in arguments if a is not type(None))
        return _checked(wanted, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: {value!r:.80} is no list")
        if arguments[-1] is ...:
            return tuple(_checked(arguments[0], v, where) for v in value)
        if len(value) != len(arguments):
            raise ValueError(f"{where}: {value!r:.80} does not have {len(arguments)} elements")
        return tuple(_checked(a, v, where) for a, v in zip(arguments, value))
    if type(value) is not kind:
        raise ValueError(f"{where}: {value!r:.80} is no {kind.__name__}")
    return value
