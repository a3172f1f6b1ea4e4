"""Operators that PyTorch composes of others. Autograd decomposes them; in inference mode nothing has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.client import DispatchKey, has_kernel

from . import host_collectives

aten = torch.ops.aten

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

_HERE = ("PrivateUse1", "CompositeExplicitAutograd")

#: The worker runs these whole: their results depend on their inputs alone.
_WHOLE = frozenset({aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default})


def parts(func: Any) -> Handler | None:
    """A handler that runs ``func`` as the operators that it is composed of, or None if it is not composed."""
    if func in _WHOLE:
        return None
    collective = host_collectives.handler(func)
    if collective is not None:
        return collective
    if has_kernel(func.name(), "CompositeImplicitAutograd"):

        def take_apart(dispatcher: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return func.decompose(*args, **kwargs)

        return take_apart
    if func.namespace != "aten":
        # A library's own operator, written in Python for every device: the worker has only its parts.
        return parts_here(func)
    return None


def parts_here(func: Any) -> Handler | None:
    """A handler that runs the kernel of ``func`` that is the same for every device, or None if it has none.

    A library's kernel for devices like this one, such as FSDP's, comes before it.
    """
    for name in _HERE:
        if has_kernel(func.name(), name):
            key = getattr(DispatchKey, name)
            return lambda dispatcher, args, kwargs: func._op_dk(key, *args, **kwargs)
    return None
