"""Optimisers take their ways for many tensors at once (foreach, fused) on a slice as they do on CUDA."""

from __future__ import annotations

import importlib

from .tensor import RemoteTensor


def register() -> None:
    """PyTorch asks for the exact type of a parameter: name ours beside its own."""
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        kinds = importlib.import_module(module)._foreach_supported_types
        if RemoteTensor not in kinds:
            kinds.append(RemoteTensor)
