"""Replaces attributes of PyTorch's modules and classes, and restores them."""

from __future__ import annotations

from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.client import builtin_table, find_builtin, register_builtin

_MISSING = object()


class Patches:
    """Replacements that are restored together."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set the attribute ``name`` of ``owner``."""
        before = vars(owner).get(name, _MISSING)
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
