"""Operators that are not one call in the worker: copies to and from the host, values, allocation,
and those that change a tensor's own geometry."""

from __future__ import annotations

from typing import Any

import torch

from . import names
from .dispatch import Dispatcher, special
from .memory import host_bytes
from .records import READ
from .tensor import RemoteTensor, geometry, make, make_view

aten = torch.ops.aten


def upload(d: Dispatcher, destination: RemoteTensor, source: torch.Tensor) -> None:
    """Copy a CPU tensor into a remote one, converting and broadcasting as ``copy_`` does."""
    geom = destination._geometry
    source = source.detach().resolve_conj().resolve_neg()
    source = source.to(geom.dtype).expand(geom.size).contiguous()
    d.stream.upload(destination._storage, geom, host_bytes(source))


def download(d: Dispatcher, source: RemoteTensor, destination: torch.Tensor) -> None:
    """Copy a remote tensor into a CPU one of the same size; only its own elements cross the wire."""
    if destination.device.type == "meta":
        return  # which has no elements
    geom = source._geometry
    direct = destination.dtype == geom.dtype and destination.is_contiguous() and not destination.is_conj()
    target = destination if direct else torch.empty(geom.size, dtype=geom.dtype)
    d.stream.ask((READ, source._storage.id, geom.wire()), host_bytes(target))
    if not direct:
        destination.copy_(target)


@special(aten.copy_.default)
def _copy(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    destination, source = args[0], args[1]
    if type(destination) is not RemoteTensor:
        if destination.shape != source.shape:
            source = source.expand(destination.shape)
        download(d, source, destination)
    elif type(source) is not RemoteTensor:
        upload(d, destination, source)
    elif not _is_itself(destination, source):
        d.run(aten.copy_.default, (destination, source), {})
    return destination


def _is_itself(a: RemoteTensor, b: RemoteTensor) -> bool:
    """The same elements in the same order. PyTorch's composites with ``out=`` copy a view of the output back into
    it where they cannot see that it is one: a tensor without memory here shares none."""
    if a._storage is not b._storage:
        return False
    x, y = a._geometry, b._geometry
    return (
        (x.offset, x.dtype, x.numel()) == (y.offset, y.dtype, y.numel())
        and x.is_contiguous()
        and y.is_contiguous()
    )


@special(aten._to_copy.default)
def _to_copy(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    source: RemoteTensor = args[0]
    wanted = {k: v for k, v in kwargs.items() if k in ("dtype", "layout", "memory_format") and v is not None}
    device = kwargs.get("device")
    if device is None or names.slice_index(device) is not None:
        if device is not None:
            wanted["device"] = device
        return d.run(aten._to_copy.default, (source,), wanted)
    shape = aten._to_copy.default(source._geometry.on_meta(), **wanted)
    result = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
    if shape.dtype.itemsize < source.dtype.itemsize:
        source = d.run(aten._to_copy.default, (source,), {"dtype": shape.dtype})
    download(d, source, result)
    return result


@special(aten._local_scalar_dense.default)
def _value(d: Dispatcher, args: tuple, kwargs: dict) -> Any:
    cell = torch.empty((), dtype=args[0].dtype)
    download(d, args[0], cell)
    return cell.item()


@special(aten._unsafe_view.default)
def _unsafe_view(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    return d.run(aten.view.default, args, kwargs)


@special(aten.lift_fresh.default, aten.alias.default)
def _alias(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    return make_view(args[0], args[0]._geometry)


@special(aten._conj.default)
def _conj(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    # A lazy conjugate is a bit on the tensor that the worker would not see.
    return d.run(aten._conj_physical.default, args, {})


@special(aten._neg_view.default)
def _neg_view(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    return d.run(aten.neg.default, args, {})


@special(aten.record_stream.default)
def _record_stream(d: Dispatcher, args: tuple, kwargs: dict) -> None:
    """Storages are freed in the order of the stream; there is nothing to record."""


# -- allocation


def empty(d: Dispatcher, size: Any, stride: Any, dtype: Any, device: torch.device) -> RemoteTensor:
    index = names.slice_index(device)
    assert index is not None
    geom = geometry(size, stride, 0, dtype or torch.get_default_dtype(), index, names.says_cuda(device))
    return make(d.stream.allocate(geom.nbytes, index), geom)


def _like(func: Any) -> None:
    """``zeros_like(t, device="cpu")`` and its kin take of ``t`` its geometry alone."""

    @special(func)
    def make_like(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
        device = kwargs.get("device")
        if device is None or names.slice_index(device) is not None:
            return d.run(func, args, kwargs)
        return func(args[0]._geometry.on_meta(), *args[1:], **kwargs)


LIKE = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
for _func in LIKE:
    _like(_func)

#: What needs nothing of its tensor but the geometry.
ALLOCATES = (aten.new_empty.default, aten.empty_like.default, aten.new_empty_strided.default)


@special(*ALLOCATES)
def _new_empty(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    source: RemoteTensor = args[0]
    name = {3: aten.new_empty_strided.default, 2: aten.new_empty.default}.get(
        len(args), aten.empty_like.default
    )
    wanted = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
    shape = name(source._geometry.on_meta(), *args[1:], **wanted)
    device = kwargs.get("device")
    if device is not None and names.slice_index(device) is None:
        return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
    return empty(d, shape.shape, shape.stride(), shape.dtype, source.device if device is None else device)
