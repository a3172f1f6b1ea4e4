"""Sends attention as one operator when no gradient is needed, so that the worker can use a fused kernel."""

from __future__ import annotations

from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import forward_ad

_op = torch.ops.aten.scaled_dot_product_attention.default


def _attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """``scaled_dot_product_attention`` with the arguments of PyTorch's own.

    Query of shape (…, queries, features), key (…, keys, features) and value (…, keys, value features),
    all of one floating-point dtype; the optional mask is of bool or of that dtype and broadcasts to (…,
    queries, keys). Returns a tensor of shape (…, queries, value features) and the dtype of the query.

    With a gradient it is decomposed: what fused kernels save for the backward pass differs from GPU to GPU.
    """
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    whole = (
        all(type(t) is RemoteTensor for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and forward_ad._current_level < 0
    )
    if whole:
        return attachment.call(_op, args, kwargs)
    return _op.decompose(*args, **kwargs)


def register() -> torch.library.Library:
    """Register attention with PyTorch. The caller must keep the library: it is unregistered with it."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    return library
