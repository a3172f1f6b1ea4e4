"""Attention in one piece where nothing is to be differentiated, so that the worker's own fused kernel does it."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from . import connection
from .tensor import RemoteTensor

_op = torch.ops.aten.scaled_dot_product_attention.default


def _attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Taken apart where a gradient is wanted: the fused kernels' statistics differ from GPU to GPU."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    whole = (
        all(type(t) is RemoteTensor for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and forward_ad._current_level < 0
    )
    if whole:
        return connection.call(_op, args, kwargs)
    return _op.decompose(*args, **kwargs)


def register() -> torch.library.Library:
    """Keep what is returned."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    return library
