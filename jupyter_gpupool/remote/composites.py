"""Operators that PyTorch builds of others. Autograd takes them apart; in inference mode nobody has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

#: The worker may as well do these in one piece: nothing but their inputs decides what they give.
_WHOLE = frozenset({aten.linear.default, aten.matmul.default})


def parts(func: Any) -> Callable[[Any, tuple, dict], Any] | None:
    """A handler that runs ``func`` as the operators it is made of, or None where it is one by itself."""
    if func in _WHOLE or not torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    ):
        return None

    def take_apart(dispatcher: Any, args: tuple, kwargs: dict) -> Any:
        return func.decompose(*args, **kwargs)

    return take_apart
