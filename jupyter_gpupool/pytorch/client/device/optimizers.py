"""Lets optimizers use their implementations for many tensors at once (foreach, fused) on a slice."""

from __future__ import annotations

from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import FOREACH_TYPES


def register() -> None:
    """Add remote tensors to the types that PyTorch's foreach implementations accept."""
    for kinds in FOREACH_TYPES:
        if RemoteTensor not in kinds:
            kinds.append(RemoteTensor)
