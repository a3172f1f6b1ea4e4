"""Sequences of different lengths. Their lengths are the CPU's, on any device."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .dispatch import Dispatcher, special
from .patches import Patches
from .tensor import RemoteTensor

aten = torch.ops.aten


@special(aten._nested_tensor_from_mask_left_aligned.default)
def _not_nested(d: Dispatcher, args: tuple, kwargs: dict) -> bool:
    """The device has no nested tensors; this makes TransformerEncoder content itself with padded ones."""
    return False


@special(aten._pack_padded_sequence.default)
def _pack(d: Dispatcher, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(the rows of all steps one after another, how many there are in each step)."""
    padded, lengths, batch_first = args
    if lengths.device.type != "cpu" or lengths.dim() != 1 or lengths.dtype is not torch.int64:
        raise RuntimeError(
            f"'lengths' argument should be a 1D CPU int64 tensor, but got {lengths.dim()}D {lengths.device} "
            f"{str(lengths.dtype)[6:].capitalize()} tensor"
        )
    if batch_first:
        padded = padded.transpose(0, 1)
    wanted = lengths.tolist()
    if len(wanted) != padded.shape[1]:
        raise RuntimeError(
            "Expected `len(lengths)` to be equal to batch_size, but got "
            f"{len(wanted)} (batch_size={padded.shape[1]})"
        )
    if min(wanted) <= 0:
        raise RuntimeError(
            "Length of all samples has to be greater than 0, but found an element in 'lengths' that is <= 0"
        )
    if wanted != sorted(wanted, reverse=True):
        raise RuntimeError(
            "`lengths` array must be sorted in decreasing order when `enforce_sorted` is True. You can pass "
            "`enforce_sorted=False` to pack_padded_sequence and/or pack_sequence to sidestep this requirement "
            "if you do not need ONNX exportability."
        )
    rows, start = [], 0
    for count in range(len(wanted), 0, -1):
        end = wanted[count - 1]  # the shortest of the first `count` sequences
        if end > start:
            rows.append(padded[start:end, :count].reshape(-1, *padded.shape[2:]))
            start = end
    sizes = torch.tensor([sum(length > step for length in wanted) for step in range(wanted[0])])
    return torch.cat(rows), sizes


def alias(patches: Patches) -> None:
    """``ctc_loss`` takes lengths from the CPU; PyTorch brings them along for tensors of its own kind only."""
    native = torch.ctc_loss

    @functools.wraps(native)
    def ctc_loss(log_probs: torch.Tensor, targets: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if type(log_probs) is RemoteTensor:
            home = log_probs.device
            args = tuple(a.to(home) if isinstance(a, torch.Tensor) else a for a in args)
            kwargs = {k: v.to(home) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return native(log_probs, targets, *args, **kwargs)

    patches.set(torch, "ctc_loss", ctc_loss)
