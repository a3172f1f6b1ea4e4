"""Replaces attributes of PyTorch's modules and classes, and restores them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.client import builtin_table, find_builtin, register_builtin

from .replacements import replacement

_MISSING = object()


class Patches:
    """Replacements that are restored together."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []
        self._made: dict[tuple[int, int], tuple[Any, Any, Any]] = {}

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        """The replaced attributes: owner and name."""
        return ((owner, name) for owner, name, _ in self._saved)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set the attribute ``name`` of ``owner``, which then looks like what it replaces."""
        before = vars(owner).get(name, _MISSING)
        native = getattr(owner, name, None) if before is _MISSING else before
        key = id(native), id(value)
        if key not in self._made:
            # PyTorch has one function in several modules, and so must this be.
            self._made[key] = native, value, replacement(owner, name, native, value)
        value = self._made[key][2]
        self._saved.append((owner, name, before))
        setattr(owner, name, value)
        operator = find_builtin(before) if owner is torch else None
        if operator:
            # TorchScript finds an operator by the identity of its function.
            register_builtin(value, operator)

    def restore(self) -> None:
        """Undo every replacement, the last one first."""
        while self._saved:
            owner, name, value = self._saved.pop()
            # The table is by id(), which another object may get next.
            builtin_table().pop(id(vars(owner)[name]), None)
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._made.clear()
