"""Operators that change the geometry of a tensor they are given: ``resize_``, ``t_``, ``set_`` and
``out=`` arguments of another size."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .dispatch import Dispatcher, fills_outputs, fits_outputs, special
from .signature import on_meta
from .tensor import Geometry, RemoteTensor, geometry, make, retarget

aten = torch.ops.aten


def _settle(d: Dispatcher, t: RemoteTensor, meta: torch.Tensor, inherit: bool = True) -> RemoteTensor:
    """Give ``t`` the geometry of ``meta``, on a larger storage where its own is too small."""
    old: Geometry = t._geometry
    geom = geometry(meta.shape, meta.stride(), int(meta.storage_offset()), meta.dtype, old.index, old.cuda)
    storage = t._storage
    if geom.nbytes > storage.nbytes:
        storage = d.stream.allocate(geom.nbytes, old.index)
        if inherit and old.numel():
            known = min(old.nbytes, geom.nbytes) // old.dtype.itemsize
            line = geometry((known,), (1,), 0, old.dtype, old.index, old.cuda)
            d.run(aten.copy_.default, (make(storage, line), make(t._storage, line)), {})
    retarget(t, storage, geom)
    return t


@special(aten.resize_.default)
def _resize(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    t: RemoteTensor = args[0]
    size = tuple(args[1])
    if size == tuple(t._geometry.size):
        return t
    memory_format = kwargs.get("memory_format")
    meta = torch.empty(
        size, dtype=t.dtype, device="meta", memory_format=memory_format or torch.contiguous_format
    )
    return _settle(
        d, t, meta.as_strided(meta.shape, meta.stride(), t._geometry.offset) if t._geometry.offset else meta
    )


@special(aten.resize_as_.default)
def _resize_as(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    t, other = args[0], args[1]
    shape = other._geometry.on_meta() if type(other) is RemoteTensor else other.to("meta")
    return _settle(d, t, aten.resize_as_.default(t._geometry.new_meta(), shape, **kwargs))


def _in_place_view(func: Any) -> None:
    @special(func)
    def change(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
        t: RemoteTensor = args[0]
        meta = t._geometry.new_meta()
        return _settle(d, t, func(meta, *args[1:], **kwargs))


for _func in (
    aten.t_.default,
    aten.transpose_.default,
    aten.swapaxes_.default,
    aten.swapdims_.default,
    aten.squeeze_.default,
    aten.squeeze_.dim,
    aten.squeeze_.dims,
    aten.unsqueeze_.default,
    aten.as_strided_.default,
):
    _in_place_view(_func)


@special(aten.set_.source_Tensor, aten.set_.source_Tensor_storage_offset)
def _set(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    t, source = args[0], args[1]
    geom = source._geometry
    if len(args) > 2:
        offset, size = args[2], args[3]
        stride = args[4] if len(args) > 4 else torch.empty(size, device="meta").stride()
        geom = geometry(size, stride, offset, geom.dtype, geom.index, geom.cuda)
    retarget(t, source._storage, geom)
    return t


@special(aten.set_.default)
def _set_nothing(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
    old = args[0]._geometry
    retarget(
        args[0], d.stream.allocate(0, old.index), geometry((0,), (1,), 0, old.dtype, old.index, old.cuda)
    )
    return args[0]


@fits_outputs
def fit_outputs(d: Dispatcher, func: Any, args: tuple, kwargs: dict) -> bool:
    """Resize the ``out=`` tensors of a call as PyTorch would; whether any had to be."""
    outs = [a.name for a in func._schema.arguments if a.is_out]
    if not outs:
        return False
    metas: dict[int, torch.Tensor] = {}
    try:
        func(*[on_meta(a, metas) for a in args], **{k: on_meta(v, metas) for k, v in kwargs.items()})
    except NotImplementedError:
        return False  # only running it tells
    changed = False
    for name in outs:
        t = kwargs.get(name)
        if type(t) is RemoteTensor and metas[id(t)].shape != t._geometry.size:
            _settle(d, t, metas[id(t)], inherit=False)
            changed = True
    return changed


@fills_outputs
def fill_outputs(d: Dispatcher, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run a call whose results only running it tells without its ``out=`` tensors, and copy into them."""
    outs = [a.name for a in func._schema.arguments if a.is_out]
    functional = _without_outputs(func) if outs else None
    if functional is None:
        return NotImplemented
    results = d(functional, args, {k: v for k, v in kwargs.items() if k not in outs})
    single = isinstance(results, torch.Tensor)
    for name, result in zip(outs, [results] if single else results):
        t = kwargs[name]
        if result.shape != t.shape:
            _settle(d, t, torch.empty(result.shape, dtype=t.dtype, device="meta"), inherit=False)
        d.run(aten.copy_.default, (t, result), {})
    return kwargs[outs[0]] if single else tuple(kwargs[name] for name in outs)


@functools.cache
def _without_outputs(func: Any) -> Any:
    """The overload that takes what ``func`` takes, but for its ``out=`` tensors; None if there is none."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
    packet = func.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            return found
    return None


def _fitted_first(func: Any) -> None:
    """Floats say how long the result is, which signatures leave out: it is made as long first."""

    @special(func)
    def call(d: Dispatcher, args: tuple, kwargs: dict) -> torch.Tensor:
        fit_outputs(d, func, args, kwargs)
        return d.run(func, args, kwargs)


for _func in (aten.arange.out, aten.arange.start_out, aten.range.out):
    _fitted_first(_func)
