"""Replacing functions of PyTorch so that they can be put back."""

from __future__ import annotations

from typing import Any

import torch

_MISSING = object()


class Patches:
    """Attributes set together and restored together."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        before = vars(owner).get(name, _MISSING)
        self._saved.append((owner, name, before))
        setattr(owner, name, value)
        operator = torch.jit._builtins._find_builtin(before) if owner is torch else None
        if operator:
            # TorchScript knows the functions that are operators by themselves.
            torch.jit._builtins._register_builtin(value, operator)

    def restore(self) -> None:
        while self._saved:
            owner, name, value = self._saved.pop()
            # By identity, which another object may have next.
            torch.jit._builtins._get_builtin_table().pop(id(vars(owner)[name]), None)
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
