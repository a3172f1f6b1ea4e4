"""What common operators give, told by arithmetic alone where the case is plain.

Meta kernels cost up to a millisecond, and a decoder meets new shapes at every step. A rule answers only
for plain cases and is None for all others, which meta tensors then tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .tensor import Geometry, RemoteTensor, geometry

aten = torch.ops.aten

Rule = Callable[..., "Geometry | None"]
RULES: dict[Any, Rule] = {}


def geometry_of(func: Any, args: tuple, kwargs: dict) -> Geometry | None:
    """The geometry of the one new tensor that ``func`` gives, or None where only its meta kernel tells."""
    rule = RULES.get(func)
    if rule is None or (kwargs and rule is not _attention):
        return None
    return rule(*args, **kwargs)


def _rule(*funcs: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(funcs, rule))
        return rule

    return register


def _plain(x: Any) -> bool:
    """A contiguous tensor of floating-point numbers that has elements."""
    if type(x) is not RemoteTensor:
        return False
    geom = x._geometry
    return geom.dtype.is_floating_point and 0 not in geom.size and geom.is_contiguous()


def _packed(x: Any) -> bool:
    """As _plain, with no freedom in the strides: those of dimensions of size one are kept by what works by element."""
    return _plain(x) and x._geometry.stride == _strides(x._geometry.size)


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for s in reversed(size):
        stride.append(step)
        step *= s
    return tuple(reversed(stride))


def _new(like: RemoteTensor, size: tuple[int, ...]) -> Geometry:
    geom = like._geometry
    return geometry(size, _strides(size), 0, geom.dtype, geom.index, geom.cuda)


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
def _as_it_is(x: Any) -> Geometry | None:
    return _new(x, x._geometry.size) if _packed(x) else None


@_rule(aten._softmax.default, aten._log_softmax.default)
def _softmax(x: Any, dim: Any, half_to_float: Any) -> Geometry | None:
    if not _packed(x) or half_to_float or not -x.dim() <= dim < x.dim():
        return None
    return _new(x, x._geometry.size)


@_rule(aten._safe_softmax.default)
def _safe_softmax(x: Any, dim: Any, dtype: Any = None) -> Geometry | None:
    return _softmax(x, dim, False) if dtype is None else None


@_rule(
    *(aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar),
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor),
)
def _with_number(x: Any, other: Any) -> Geometry | None:
    if not _packed(x):
        return None
    if type(other) in (int, float):
        return _new(x, x._geometry.size)
    same = type(other) is RemoteTensor and other._geometry is x._geometry
    return _new(x, x._geometry.size) if same else None


@_rule(aten.cat.default)
def _cat(parts: Any, dim: int = 0) -> Geometry | None:
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
def _mm(a: Any, b: Any) -> Geometry | None:
    return _matrices(a, b, 2)


@_rule(aten.bmm.default)
def _bmm(a: Any, b: Any) -> Geometry | None:
    return _matrices(a, b, 3)


def _matrices(a: Any, b: Any, dims: int) -> Geometry | None:
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
) -> Geometry | None:
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
