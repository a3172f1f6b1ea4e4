"""Predicts the layouts of common operators' results by arithmetic.

Meta kernels take up to a millisecond, and a decoder has new shapes at every step. A rule answers for plain
cases only. For all others it returns None, and a meta kernel answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor, TensorLayout, geometry

aten = torch.ops.aten

#: What an operator returns: the layout of its one new tensor, or those of several; None for one that is not computed.
Layouts = TensorLayout | tuple[TensorLayout | None, ...]
Rule = Callable[..., "Layouts | None"]
RULES: dict[Any, Rule] = {}


def layouts_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layouts | None:
    """The layouts of the new tensors that ``func`` returns, or None if no rule answers."""
    rule = RULES.get(func)
    if rule is None or (kwargs and rule is not _attention):
        return None
    return rule(*args, **kwargs)


def changes_elements_only(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` is an in-place operator on lists of tensors whose layouts are equal, position by position.

    Then no layout changes, and nothing is returned. Optimizers call these with all their parameters.
    """
    if not func._schema.name.startswith("aten::_foreach_") or func._schema.returns:
        return False
    lists = [value for value in args if isinstance(value, (list, tuple))]
    tensors = [value for value in lists if any(isinstance(t, torch.Tensor) for t in value)]
    if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())) or not tensors:
        return False
    first = [t._geometry for t in tensors[0] if type(t) is RemoteTensor and t.is_floating_point()]
    return all(
        len(other) == len(first)
        and all(type(t) is RemoteTensor and t._geometry is g for t, g in zip(other, first))
        for other in tensors
    ) and all(len(value) == len(first) for value in lists)


def _rule(*funcs: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(funcs, rule))
        return rule

    return register


def _plain(x: Any) -> bool:
    """Whether ``x`` is a contiguous remote tensor of a floating-point dtype with at least one element."""
    if type(x) is not RemoteTensor:
        return False
    geom = x._geometry
    return geom.dtype.is_floating_point and 0 not in geom.size and geom.is_contiguous()


def _packed(x: Any) -> bool:
    """As _plain, and the strides of dimensions of size 1 are the usual ones too: elementwise operators keep them."""
    return _plain(x) and x._geometry.stride == _strides(x._geometry.size)


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for s in reversed(size):
        stride.append(step)
        step *= s
    return tuple(reversed(stride))


def _new(like: RemoteTensor, size: tuple[int, ...], dtype: torch.dtype | None = None) -> TensorLayout:
    geom = like._geometry
    return geometry(size, _strides(size), 0, dtype or geom.dtype, geom.index, geom.cuda)


@_rule(
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default),
    *(
        aten.exp.default,
        aten.neg.default,
        aten.rsqrt.default,
        aten.sqrt.default,
        aten.cos.default,
        aten.sin.default,
    ),
)
def _as_it_is(x: Any) -> TensorLayout | None:
    return _new(x, x._geometry.size) if _packed(x) else None


@_rule(aten._softmax.default, aten._log_softmax.default)
def _softmax(x: Any, dim: Any, half_to_float: Any) -> TensorLayout | None:
    if not _packed(x) or half_to_float or not -x.dim() <= dim < x.dim():
        return None
    return _new(x, x._geometry.size)


@_rule(aten._safe_softmax.default)
def _safe_softmax(x: Any, dim: Any, dtype: Any = None) -> Layouts | None:
    return _softmax(x, dim, False) if dtype is None else None


@_rule(
    *(aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar),
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor),
)
def _with_number(x: Any, other: Any) -> TensorLayout | None:
    if not _packed(x):
        return None
    if type(other) in (int, float):
        return _new(x, x._geometry.size)
    same = type(other) is RemoteTensor and other._geometry is x._geometry
    return _new(x, x._geometry.size) if same else None


@_rule(aten.cat.default)
def _cat(parts: Any, dim: int = 0) -> TensorLayout | None:
    if not all(map(_plain, parts)):
        return None
    first = parts[0]._geometry
    size = list(first.size)
    if not size or not -len(size) <= dim < len(size):
        return None
    dim %= len(size)
    for part in parts[1:]:
        other = part._geometry
        if other.dtype != first.dtype or other.index != first.index or len(other.size) != len(size):
            return None
        if other.size[:dim] != first.size[:dim] or other.size[dim + 1 :] != first.size[dim + 1 :]:
            return None
        size[dim] += other.size[dim]
    return _new(parts[0], tuple(size))


@_rule(aten.mm.default)
def _mm(a: Any, b: Any) -> TensorLayout | None:
    return _matrices(a, b, 2)


@_rule(aten.bmm.default)
def _bmm(a: Any, b: Any) -> TensorLayout | None:
    return _matrices(a, b, 3)


def _matrices(a: Any, b: Any, dims: int) -> TensorLayout | None:
    if type(a) is not RemoteTensor or type(b) is not RemoteTensor:
        return None
    x, y = a._geometry, b._geometry
    plain = x.dtype.is_floating_point and x.dtype == y.dtype and x.index == y.index
    if not plain or len(x.size) != dims or len(y.size) != dims or 0 in x.size or 0 in y.size:
        return None
    if x.size[:-2] != y.size[:-2] or x.size[-1] != y.size[-2]:
        return None
    return _new(a, (*x.size[:-1], y.size[-1]))


@_rule(aten.scaled_dot_product_attention.default)
def _attention(
    q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, *rest: Any, **named: Any
) -> TensorLayout | None:
    if mask is not None or dropout or named.get("attn_mask") is not None or "enable_gqa" in named:
        return None
    if any(type(t) is not RemoteTensor for t in (q, k, v)) or len(rest) > 1:
        return None
    x, y, z = q._geometry, k._geometry, v._geometry
    if (
        not x.dtype.is_floating_point
        or not x.dtype == y.dtype == z.dtype
        or not x.index == y.index == z.index
    ):
        return None
    if len(x.size) != 4 or y.size[:-1] != z.size[:-1] or x.size[:2] != y.size[:2] or x.size[-1] != y.size[-1]:
        return None
    if 0 in x.size or 0 in z.size:
        return None
    return _new(q, (*x.size[:-1], z.size[-1]))


@_rule(aten.addmm.default)
def _addmm(bias: Any, a: Any, b: Any) -> TensorLayout | None:
    product = _matrices(a, b, 2)
    if product is None or type(bias) is not RemoteTensor:
        return None
    x = bias._geometry
    same = (x.dtype, x.index, x.cuda) == (product.dtype, product.index, product.cuda)
    if x.size != product.size[-1:] or not same:
        return None
    return product


@_rule(aten.native_dropout.default)
def _dropout(x: Any, p: float, train: Any) -> Layouts | None:
    # Its decomposition would import all of torch._dynamo.
    if not _dense(x) or train is not True or not 0 < p < 1:
        return None
    return _alike(x), _alike(x, torch.bool)


@_rule(aten.native_dropout_backward.default)
def _dropout_backward(grad: Any, mask: Any, scale: float) -> TensorLayout | None:
    if not _dense(grad) or type(mask) is not RemoteTensor:
        return None
    x, y = grad._geometry, mask._geometry
    same = (x.size, x.stride, x.index) == (y.size, y.stride, y.index) and y.dtype is torch.bool
    return _alike(grad) if same else None


def _dense(x: Any) -> bool:
    """Whether ``x`` fills its memory in some order of its dimensions, which elementwise operators then keep."""
    if type(x) is not RemoteTensor or not x._geometry.dtype.is_floating_point:
        return False
    if x._geometry.stride == _strides(x._geometry.size):
        return 0 not in x._geometry.size
    step = 1
    for stride, size in sorted(zip(x._geometry.stride, x._geometry.size)):
        if stride != step or size < 2:  # the stride of a dimension of size 1 says nothing
            return False
        step *= size
    return True


def _alike(x: RemoteTensor, dtype: torch.dtype | None = None) -> TensorLayout:
    geom = x._geometry
    return geometry(geom.size, geom.stride, 0, dtype or geom.dtype, geom.index, geom.cuda)


@_rule(aten.native_layer_norm.default)
def _layer_norm(x: Any, normalized: Any, weight: Any, bias: Any, eps: float) -> Layouts | None:
    if not _is_normalized(x, normalized) or not _are_of(normalized, x, weight, bias):
        return None
    kept = x.dim() - len(normalized)
    statistics = _new(x, (*x._geometry.size[:kept], *[1] * len(normalized)))
    return _new(x, x._geometry.size), statistics, statistics


@_rule(aten.native_layer_norm_backward.default)
def _layer_norm_backward(
    grad: Any, x: Any, normalized: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> Layouts | None:
    if not _is_normalized(x, normalized) or weight is None or bias is None:
        return None
    if not _packed(grad) or grad._geometry is not x._geometry or not _are_of(normalized, x, weight, bias):
        return None
    sizes = (x._geometry.size, weight._geometry.size, bias._geometry.size)
    return tuple(_new(x, size) if wanted else None for size, wanted in zip(sizes, mask))


def _is_normalized(x: Any, normalized: Any) -> bool:
    # Of half-precision input, the dtype of the statistics differs from device to device.
    wide = _packed(x) and x._geometry.dtype in (torch.float32, torch.float64)
    return (
        wide and 0 < len(normalized) <= x.dim() and x._geometry.size[-len(normalized) :] == tuple(normalized)
    )


def _are_of(size: Any, like: Any, *tensors: Any) -> bool:
    """Whether each is None, or packed and of this size, with the dtype and the device of ``like``."""
    x = like._geometry
    return all(
        t is None
        or _packed(t)
        and (t._geometry.size, t._geometry.dtype, t._geometry.index) == (tuple(size), x.dtype, x.index)
        for t in tensors
    )
