"""Replacements on emulated GPUs for operators that a CPU lacks, or runs with other results than a GPU.

Each has the arguments and results of its operator's schema. The formulas are those that torch.nn.LSTMCell
and torch.nn.GRUCell document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .sync_batch_norm import SYNC_BATCH_NORM

aten = torch.ops.aten


def _with_biases(gates: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return gates if bias is None else gates + bias


def _lstm_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    cx: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hy, cy, workspace); the workspace keeps the activated gates i, f, g, o side by side."""
    gates = _with_biases(input_gates, input_bias) + _with_biases(hidden_gates, hidden_bias)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat((i, f, g, o), 1)


def _lstm_cell_backward(
    grad_hy: torch.Tensor | None,
    grad_cy: torch.Tensor | None,
    cx: torch.Tensor,
    cy: torch.Tensor,
    workspace: torch.Tensor,
    has_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(grad of all gates, grad of cx, grad of the bias)."""
    if grad_hy is None and grad_cy is None:
        return None, None, None
    i, f, g, o = workspace.chunk(4, 1)
    tanh_cy = cy.tanh()
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad_c = grad_hy * o * (1 - tanh_cy * tanh_cy)
    if grad_cy is not None:
        grad_c = grad_c + grad_cy
    gates = torch.cat(
        (
            grad_c * g * i * (1 - i),
            grad_c * cx * f * (1 - f),
            grad_c * i * (1 - g * g),
            grad_hy * tanh_cy * o * (1 - o),
        ),
        1,
    )
    return gates, grad_c * f, gates.sum(0) if has_bias else None


def _gru_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hx: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hy, workspace); the workspace keeps r, z, n, hx and the hidden part of n side by side."""
    ir, iz, in_ = _with_biases(input_gates, input_bias).chunk(3, 1)
    hr, hz, hn = _with_biases(hidden_gates, hidden_bias).chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (in_ + r * hn).tanh()
    return (hx - n) * z + n, torch.cat((r, z, n, hx, hn), 1)


def _gru_cell_backward(grad_hy: torch.Tensor, workspace: torch.Tensor, has_bias: bool) -> tuple[Any, ...]:
    """(grad of the input gates, of the hidden gates, of hx, of the input bias, of the hidden bias)."""
    r, z, n, hx, hn = workspace.chunk(5, 1)
    grad_n = grad_hy * (1 - z) * (1 - n * n)
    grad_z = grad_hy * (hx - n) * z * (1 - z)
    grad_r = grad_n * hn * r * (1 - r)
    inputs = torch.cat((grad_r, grad_z, grad_n), 1)
    hidden = torch.cat((grad_r, grad_z, grad_n * r), 1)
    biases = (inputs.sum(0), hidden.sum(0)) if has_bias else (None, None)
    return inputs, hidden, grad_hy * z, *biases


def _batch_norm(function: Callable[..., Any]) -> Callable[..., Any]:
    """(normalised, mean, 1/std, …); in evaluation a CPU leaves the statistics out, which are not used then."""

    def normalize(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        out, mean, inverse_std, *rest = function(x, *args)
        channels = x.shape[1]
        if mean.numel() != channels:
            mean, inverse_std = mean.new_zeros(channels), mean.new_zeros(channels)
        return out, mean, inverse_std, *rest

    return normalize


_HALVES = (torch.float16, torch.bfloat16)


def _floats(args: tuple[Any, ...]) -> list[Any]:
    return [a.float() if isinstance(a, torch.Tensor) and a.dtype in _HALVES else a for a in args]


def _normalizing(function: Callable[..., Any], updated: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Normalize float16 and bfloat16 in float32, with float32 statistics, as a GPU does.

    ``updated`` are the positions of arguments that are changed (running statistics).
    """

    def normalize(x: torch.Tensor, *args: Any) -> Any:
        if x.dtype not in _HALVES:
            return function(x, *args)
        given = (x, *args)
        floats = _floats(given)
        out, *statistics = function(*floats)
        for n in updated:
            if given[n] is not None and given[n] is not floats[n]:
                given[n].copy_(floats[n])
        return out.to(x.dtype), *statistics

    return normalize


def _normalizing_backward(function: Callable[..., Any], weight: int) -> Callable[..., Any]:
    """(grad of the input, of the weight, of the bias); ``weight`` is the position of the weight."""

    def backward(grad: torch.Tensor, x: torch.Tensor, *args: Any) -> Any:
        given = (grad, x, *args)
        if x.dtype not in _HALVES:
            return function(*given)
        of_input, *of_parameters = function(*_floats(given))
        kind = given[weight].dtype if given[weight] is not None else x.dtype
        results = [of_input if of_input is None else of_input.to(x.dtype)]
        return (*results, *(g if g is None else g.to(kind) for g in of_parameters))

    return backward


def _embedding_bag(function: Any) -> Callable[..., Any]:
    """(bags, each index's bag, bag sizes, greatest indices), the last three as a GPU shapes them."""

    def bags(
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        scale_grad_by_freq: bool = False,
        mode: int = 0,
        *rest: Any,
    ) -> tuple[torch.Tensor, ...]:
        out, bag_of, sizes, greatest = function(weight, indices, offsets, scale_grad_by_freq, mode, *rest)
        if bag_of.shape != indices.shape:  # a CPU leaves it out for sums
            places = torch.arange(len(indices), dtype=offsets.dtype)
            bag_of = (torch.bucketize(places, offsets, right=True) - 1).to(indices.dtype)
        if sizes.shape != offsets.shape:
            sizes = torch.cat((sizes, sizes.new_zeros(len(offsets) - len(sizes))))
        if mode != _MAX:
            greatest = greatest.new_empty(0)
        return out, bag_of, sizes.to(indices.dtype), greatest.to(indices.dtype)

    return bags


_MAX = 2

CPU_KERNELS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _normalizing(_batch_norm(aten.native_batch_norm.default), updated=(3, 4)),
    aten._native_batch_norm_legit.default: _normalizing(
        _batch_norm(aten.native_batch_norm.default), updated=(3, 4)
    ),
    aten._native_batch_norm_legit_no_training.default: _normalizing(
        _batch_norm(aten._native_batch_norm_legit_no_training.default)
    ),
    aten._native_batch_norm_legit_functional.default: _normalizing(
        _batch_norm(aten._native_batch_norm_legit_functional.default)
    ),
    aten._batch_norm_no_update.default: _normalizing(_batch_norm(aten._batch_norm_no_update.default)),
    aten._batch_norm_with_update.default: _normalizing(aten._batch_norm_with_update.default, updated=(3, 4)),
    aten.native_layer_norm.default: _normalizing(aten.native_layer_norm.default),
    aten.native_batch_norm_backward.default: _normalizing_backward(
        aten.native_batch_norm_backward.default, weight=2
    ),
    aten.native_layer_norm_backward.default: _normalizing_backward(
        aten.native_layer_norm_backward.default, weight=5
    ),
    aten._embedding_bag.default: _embedding_bag(aten._embedding_bag.default),
    aten._embedding_bag_forward_only.default: _embedding_bag(aten._embedding_bag_forward_only.default),
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
    **SYNC_BATCH_NORM,
}
