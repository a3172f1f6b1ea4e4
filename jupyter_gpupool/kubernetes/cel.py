"""CEL text from Python values. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Expression(str):
    """A string that is CEL already."""


def literal(value: Any) -> str:
    """Return a JSON value as CEL, in which an :class:`Expression` may stand anywhere.

    Elements of lists and objects are ``dyn``, because Kubernetes' CEL wants all of them to be of one type.
    """
    if isinstance(value, Expression):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(key)}: dyn({literal(part)})" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(f"dyn({literal(part)})" for part in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return quoted(value)


def words(texts: Iterable[str]) -> str:
    """Return a list of strings as CEL."""
    return "[" + ", ".join(map(quoted, texts)) + "]"


def quoted(text: str) -> str:
    """Return a string as CEL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def patch(op: str, path: str, value: Any = None) -> str:
    """Return an operation of a JSON Patch as CEL. ``path``: CEL; ``value``: as for :func:`literal`, None for none."""
    if value is None:
        return f"JSONPatch{{op: '{op}', path: {path}}}"
    return f"JSONPatch{{op: '{op}', path: {path}, value: {literal(value)}}}"
