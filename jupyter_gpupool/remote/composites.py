"""Operators that PyTorch builds of others. Autograd takes them apart; in inference mode nobody has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

_EXPLICIT = "CompositeExplicitAutograd"

#: The worker may as well do these in one piece: nothing but their inputs decides what they give.
_WHOLE = frozenset({aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default})


def parts(func: Any) -> Callable[[Any, tuple, dict], Any] | None:
    """A handler that runs ``func`` as the operators it is made of, or None where it is one by itself."""
    if func in _WHOLE:
        return None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if has_kernel(func.name(), "CompositeImplicitAutograd"):

        def take_apart(dispatcher: Any, args: tuple, kwargs: dict) -> Any:
            return func.decompose(*args, **kwargs)

        return take_apart
    if func.namespace != "aten" and has_kernel(func.name(), _EXPLICIT):
        # A library's own operator, written in Python for every device: the worker does not know it, its parts it does.

        def run_here(dispatcher: Any, args: tuple, kwargs: dict) -> Any:
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)

        return run_here
    return None
