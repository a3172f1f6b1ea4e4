"""JSON Patch (RFC 6902) from the difference between two JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def difference(before: Any, after: Any, path: str = "") -> list[dict[str, Any]]:
    """Return operations that turn ``before`` into ``after``. Lists may only grow at their end or change in place."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        operations: list[dict[str, Any]] = [
            {"op": "remove", "path": f"{path}/{_escaped(key)}"} for key in before if key not in after
        ]
        for key, value in after.items():
            place = f"{path}/{_escaped(key)}"
            if key in before:
                operations += difference(before[key], value, place)
            else:
                operations.append({"op": "add", "path": place, "value": value})
        return operations
    if isinstance(before, list) and isinstance(after, list) and len(before) <= len(after):
        operations = []
        for number, (old, new) in enumerate(zip(before, after)):
            operations += difference(old, new, f"{path}/{number}")
        added = after[len(before) :]
        return [*operations, *({"op": "add", "path": f"{path}/-", "value": value} for value in added)]
    if before == after and type(before) is type(after):
        return []
    return [{"op": "replace", "path": path, "value": after}]


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
