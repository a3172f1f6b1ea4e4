"""Operators on sequences of different lengths. PyTorch keeps the lengths on the CPU, on any device."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor

from .dispatcher import Dispatcher, special

aten = torch.ops.aten


class _WantsNested(Exception):
    """TransformerEncoder has chosen nested tensors, which the device has not."""


@special(aten._nested_tensor_from_mask_left_aligned.default)
def _left_aligned(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether each row of the mask is true up to some length. It is read, as CUDA reads it."""
    mask = args[1].cpu()
    return torch.equal(mask, torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True))


@special(aten._nested_tensor_from_mask.default)
def _nested(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    raise _WantsNested("torch._nested_tensor_from_mask makes a strided nested tensor, which leased GPUs lack")


@special(aten._pack_padded_sequence.default)
def _pack(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack padded sequences, as ``torch.nn.utils.rnn.pack_padded_sequence`` does.

    ``args``: the padded sequences, a remote tensor of shape (steps, batch, …) and any dtype, or (batch,
    steps, …) with ``batch_first``; their lengths, a CPU int64 tensor of shape (batch,) in decreasing
    order, each at least 1; ``batch_first``, a bool.

    Returns the rows of all steps one after another, of shape (sum of lengths, …) and the dtype of the
    sequences, on their slice; and the number of rows of each step, a CPU int64 tensor of shape (longest
    length,). Raises RuntimeError, in PyTorch's words, for other lengths.
    """
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


def _encoder(before: Any) -> Any:
    """``TransformerEncoder.forward`` that has the values of nested tensors, computed by padded ones."""

    @functools.wraps(before)
    def forward(
        self: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
    ) -> Any:
        try:
            return before(self, src, mask, src_key_padding_mask, is_causal)
        except _WantsNested:
            pass
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=None, is_causal=is_causal is True, src_key_padding_mask=src_key_padding_mask
            )
        # A nested tensor has nothing where it is padded, and becomes 0 there.
        output = output.masked_fill(src_key_padding_mask.bool().unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    return forward


def alias(patches: Patches) -> None:
    """Let ``torch.ctc_loss`` accept targets and lengths on the CPU, and TransformerEncoder leave out padding.

    Both are as with CUDA.
    ``log_probs`` is a float tensor of shape (steps, batch, classes) or (steps, classes). ``targets`` is an
    integer tensor of shape (batch, longest target) or (sum of target lengths,). The lengths are integer
    tensors of shape (batch,). What is on the CPU is copied to the slice of ``log_probs``.
    """
    native = torch.ctc_loss

    @functools.wraps(native)
    def ctc_loss(log_probs: torch.Tensor, targets: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if type(log_probs) is RemoteTensor:
            home = log_probs.device
            args = tuple(a.to(home) if isinstance(a, torch.Tensor) else a for a in args)
            kwargs = {k: v.to(home) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return native(log_probs, targets, *args, **kwargs)

    patches.set(torch, "ctc_loss", ctc_loss)
    encoder = torch.nn.TransformerEncoder
    patches.set(encoder, "forward", _encoder(encoder.forward))
