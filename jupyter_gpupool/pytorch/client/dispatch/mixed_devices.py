"""Calls that mix devices: what CUDA accepts is copied to the slice, the rest is refused in CUDA's words."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor

aten = torch.ops.aten

#: Operators whose second argument, the indices, CUDA accepts on the CPU.
_TAKES_CPU_INDICES = frozenset(
    {
        aten.index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
        aten._unsafe_index.Tensor,
        aten._unsafe_index_put.default,
    }
)

_CROSSES_DEVICES = frozenset({aten.copy_.default, aten._to_copy.default})

#: Operator → the method that CUDA names in the error, and its names of the operator's arguments.
_CHECKED_BY = {aten.embedding.default: ("_index_select", {"weight": "self", "indices": "index"})}


def bring(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with its CPU tensors copied to the slice.

    Raises RuntimeError if CUDA would.
    """
    if func not in _TAKES_CPU_INDICES:
        refuse(func, args, kwargs)
    indexed = args[0]
    if type(indexed) is not RemoteTensor:
        raise RuntimeError(
            f"indices should be either on {indexed.device} or on the same device as the indexed tensor "
            f"({indexed.device})"
        )
    values = args[2] if len(args) > 2 else None
    if values is not None and type(values) is not RemoteTensor and values.dim():
        refuse(func, args, kwargs)
    indices = [v.to(indexed.device) if isinstance(v, torch.Tensor) else v for v in args[1]]
    return (indexed, indices, *args[2:]), kwargs


def check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[RemoteTensor]) -> None:
    """Raise RuntimeError if the tensors of a call are on several slices."""
    if len({t._geometry.index for t in tensors}) > 1 and func not in _CROSSES_DEVICES:
        refuse(func, args, kwargs)


def refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    """Raise the RuntimeError that CUDA raises for a call with tensors on several devices."""
    named = [(a.name, value) for a, value in zip(func._schema.arguments, args)]
    tensors = [(name, t) for name, value in (*named, *kwargs.items()) for t in _tensors(value)]
    if func is aten.convolution.default:
        _refuse_convolution(dict(tensors))
    home = tensors[0][1].device
    strangers = [
        (n, t.device) for n, t in tensors if t.device != home and (t.dim() or t.device.type != "cpu")
    ]
    name, stranger = strangers[0] if strangers else (tensors[0][0], home)
    if torch.Tag.pointwise in func.tags:
        if home.type == "cpu":
            home, stranger = stranger, home
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {home} and {stranger}!"
        )
    operator = func._schema.name.removeprefix("aten::")
    method, spelled = _CHECKED_BY.get(func, (operator, {}))
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but got {spelled.get(name, name)} is on {stranger}, "
        f"different from other tensors on {home} (when checking argument in method wrapper_CUDA_{method})"
    )


def _refuse_convolution(tensors: dict[str, torch.Tensor]) -> None:
    first = tensors["input"]
    for name in ("weight", "bias"):
        other = tensors.get(name)
        if other is not None and other.device.type != first.device.type:
            raise RuntimeError(
                f"Input type ({first.type()}) and {name} type ({other.type()}) should be the same"
            )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []
