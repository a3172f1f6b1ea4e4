"""The operators of torch.nn.SyncBatchNorm on emulated GPUs: a CPU has none of them.

Each has the arguments and results of its operator's schema. Channels are in dimension 1; statistics of half-precision
inputs are float32, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _across(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value of each channel, to be broadcast over ``like``."""
    return _wide(values).view(1, -1, *(1 for _ in like.shape[2:]))


def _sum(t: torch.Tensor) -> torch.Tensor:
    return t.sum([d for d in range(t.dim()) if d != 1])


def _stats(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, 1/std) of each channel."""
    wide = _wide(x)
    count = x.numel() // x.shape[1]
    mean = _sum(wide) / count
    variance = _sum((wide - _across(mean, x)).square()) / count
    return mean, (variance + eps).rsqrt()


def _gather(
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, 1/std) of each channel over all ranks, of which each has a row; the running statistics are updated."""
    weights = counts.to(mean.dtype)[:, None]
    count = weights.sum()
    of_all = (weights * mean).sum(0) / count
    variance = (weights * (inverse_std.pow(-2) - eps + (mean - of_all).square())).sum(0) / count
    if running_mean is not None:
        running_mean.lerp_(of_all.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    return of_all, (variance + eps).rsqrt()


def _normalize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    out = (_wide(x) - _across(mean, x)) * _across(inverse_std, x)
    if weight is not None:
        out = out * _across(weight, x)
    if bias is not None:
        out = out + _across(bias, x)
    return out.to(x.dtype)


def _backward_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    weight: torch.Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[torch.Tensor | None, ...]:
    """(sum of the gradient, sum of its products with the centred input, grad of the weight, of the bias)."""
    kind = mean.dtype if weight is None else weight.dtype
    total = _sum(_wide(grad))
    products = _sum(_wide(grad) * (_wide(x) - _across(mean, x)))
    return (
        total if input_g else None,
        products if input_g else None,
        (products * inverse_std).to(kind) if weight_g else None,
        total.to(kind) if bias_g else None,
    )


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor,
    products: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the input; the sums are those of all ranks."""
    count = counts.sum().to(mean.dtype)
    scale = inverse_std if weight is None else inverse_std * _wide(weight)
    along = (_wide(x) - _across(mean, x)) * _across(inverse_std.square() * products / count, x)
    return ((_wide(grad) - _across(total / count, x) - along) * _across(scale, x)).to(x.dtype)


SYNC_BATCH_NORM: dict[Any, Callable[..., Any]] = {
    aten.batch_norm_stats.default: _stats,
    aten.batch_norm_gather_stats_with_counts.default: _gather,
    aten.batch_norm_elemt.default: _normalize,
    aten.batch_norm_backward_reduce.default: _backward_sums,
    aten.batch_norm_backward_elemt.default: _backward,
}
