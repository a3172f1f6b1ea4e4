"""Sends attention as one operator when no gradient is needed, so that the worker can use a fused kernel."""

from __future__ import annotations

import contextlib
import importlib
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import REPLICATES_PLAIN, forward_ad

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
    with _masks_for_all(tensors):
        return _op.decompose(*args, **kwargs)


def _masks_for_all(tensors: list[torch.Tensor]) -> AbstractContextManager[None]:
    """Within, what is made for sharded tensors, such as the mask of causal attention, counts as every rank's."""
    sharded = sys.modules.get("torch.distributed.tensor")
    if sharded is None or not any(isinstance(t, sharded.DTensor) for t in tensors):
        return contextlib.nullcontext()
    if REPLICATES_PLAIN.get():  # the program has said so; PyTorch's context would end that, too
        return contextlib.nullcontext()
    experimental = importlib.import_module("torch.distributed.tensor.experimental")
    return experimental.implicit_replication()


def register() -> torch.library.Library:
    """Register attention with PyTorch. The caller must keep the library: it is unregistered with it."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    return library
