"""Prints a remote tensor as PyTorch prints CUDA's. Only the elements that are shown cross the wire."""

from __future__ import annotations

import torch

from jupyter_gpupool.pytorch.torch_internals.client import DisableTorchFunctionSubclass
from jupyter_gpupool.pytorch.torch_internals.client import tensor_text as text


def _edges(t: torch.Tensor) -> torch.Tensor:
    """``t`` without most of the elements that are printed as an ellipsis; it prints alike."""
    edge = text.PRINT_OPTS.edgeitems
    for dim, size in enumerate(t.shape):
        if size > 2 * edge + 1:
            t = torch.cat((t.narrow(dim, 0, edge + 1), t.narrow(dim, size - edge, edge)), dim)
    return t


def _contents(t: torch.Tensor, indent: int) -> str:
    if not t.numel():
        return "[]"
    threshold = text.PRINT_OPTS.threshold
    if t.numel() <= threshold:
        return text._tensor_str(t.cpu(), indent)
    small = _edges(t).cpu()
    with text.printoptions(threshold=min(threshold, small.numel() - 1)):
        return text._tensor_str(small, indent)


def describe(t: torch.Tensor) -> str:
    """``repr(t)``."""
    grad_fn, leaf = t.grad_fn, t.requires_grad
    parameter = isinstance(t, torch.nn.Parameter)
    # As PyTorch, name the program's own class.
    name = "tensor" if parameter or type(t).__name__ == "RemoteTensor" else type(t).__name__
    prefix = f"{name}("
    with torch.no_grad(), DisableTorchFunctionSubclass():
        contents = _contents(t.detach(), len(prefix))
    suffixes = [f"device='{t.device}'"]
    default = torch.get_default_dtype()
    if not t.numel():
        if t.dim() != 1:
            suffixes.append(f"size={tuple(t.shape)}")
        usual = t.dtype is default
    else:
        complex_default = torch.complex128 if default is torch.float64 else torch.complex64
        usual = t.dtype in (default, complex_default, torch.int64, torch.bool)
    if not usual:
        suffixes.append(f"dtype={t.dtype}")
    if grad_fn is not None:
        suffixes.append(f"grad_fn=<{type(grad_fn).__name__}>")
    elif leaf:
        suffixes.append("requires_grad=True")
    described = text._add_suffixes(prefix + contents, suffixes, len(prefix), force_newline=False)
    return f"Parameter containing:\n{described}" if parameter else described
