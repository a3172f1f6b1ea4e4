"""Operators that change the layout of an argument: ``resize_``, ``t_``, ``set_``, and ``out=`` tensors
that do not fit."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.tensor import (
    FreedStorage,
    RemoteTensor,
    Storage,
    TensorLayout,
    geometry,
    make,
    retarget,
)

from .dispatcher import Dispatcher, special
from .prediction import on_meta

aten = torch.ops.aten

#: The storages that another process of the lease has sent to this one: their memory is that of the other.
received: weakref.WeakSet[Storage] = weakref.WeakSet()


def _settle(d: Dispatcher, t: RemoteTensor, meta: torch.Tensor, inherit: bool = True) -> RemoteTensor:
    """Give ``t`` the layout of ``meta``, on a larger storage if its own is too small; ``inherit`` its elements."""
    old: TensorLayout = t._geometry
    geom = geometry(meta.shape, meta.stride(), int(meta.storage_offset()), meta.dtype, old.index, old.cuda)
    if geom.nbytes > t._storage.nbytes:
        resize_storage(d, t._storage, geom.nbytes, inherit)
    retarget(t, t._storage, geom)
    return t


def resize_storage(d: Dispatcher, storage: Storage, nbytes: int, inherit: bool = True) -> None:
    """Change the size of ``storage`` to ``nbytes`` bytes; ``inherit`` its bytes as far as they fit.

    Every tensor on it stays on it. As with CUDA it gets other memory, also where it shrinks, and the old memory is
    freed, unless another process has it: the two share nothing any more. The worker refuses a tensor that needs more
    than is left. Raises RuntimeError for a storage that another process has sent.
    """
    if storage in received:
        raise RuntimeError("Trying to resize storage that is not resizable")
    if nbytes == storage.nbytes:
        return
    storage.__class__ = Storage  # it may be a FreedStorage
    had = storage.nbytes
    fresh = d.stream.allocate(nbytes, storage.index)
    kept = min(nbytes, storage.nbytes) if inherit else 0
    if kept:
        line = geometry((kept,), (1,), 0, torch.uint8, storage.index)
        d.run(aten.copy_.default, (make(fresh, line), make(storage, line)), {})
    # `fresh` takes the old memory with it when it goes.
    storage.id, fresh.id = fresh.id, storage.id
    storage.nbytes, fresh.nbytes = fresh.nbytes, storage.nbytes
    if had and not nbytes:
        storage.__class__ = FreedStorage


@special(aten.resize_.default)
def _resize(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
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
def _resize_as(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    t, other = args[0], args[1]
    shape = other._geometry.on_meta() if type(other) is RemoteTensor else other.to("meta")
    return _settle(d, t, aten.resize_as_.default(t._geometry.new_meta(), shape, **kwargs))


def _in_place_view(func: Any) -> None:
    @special(func)
    def change(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
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
def _set(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    t, source = args[0], args[1]
    geom = source._geometry
    if len(args) > 2:
        offset, size = args[2], args[3]
        stride = args[4] if len(args) > 4 else torch.empty(size, device="meta").stride()
        geom = geometry(size, stride, offset, geom.dtype, geom.index, geom.cuda)
    retarget(t, source._storage, geom)
    return t


@special(aten.set_.default)
def _set_nothing(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    old = args[0]._geometry
    retarget(
        args[0], d.stream.allocate(0, old.index), geometry((0,), (1,), 0, old.dtype, old.index, old.cuda)
    )
    return args[0]


def fit_outputs(d: Dispatcher, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Resize the ``out=`` tensors of a call to the shape of its results; return whether any was resized."""
    outs = [a.name for a in func._schema.arguments if a.is_out]
    if not outs:
        return False
    metas: dict[int, torch.Tensor] = {}
    try:
        func(*[on_meta(a, metas) for a in args], **{k: on_meta(v, metas) for k, v in kwargs.items()})
    except NotImplementedError:
        return False  # the shape is known only when it has run
    changed = False
    for name in outs:
        t = kwargs.get(name)
        if type(t) is RemoteTensor and metas[id(t)].shape != t._geometry.size:
            _settle(d, t, metas[id(t)], inherit=False)
            changed = True
    return changed


def fill_outputs(d: Dispatcher, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call without its ``out=`` tensors, copy the results into them and return them.

    NotImplemented if there is no overload of the operator without them.
    """
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
    """The overload with the arguments of ``func`` but for the ``out=`` tensors, or None."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
    packet = func.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            return found
    return None


def _fitted_first(func: Any) -> None:
    """Register a handler that resizes ``out=`` before the call.

    Floats decide the length of the result, and signatures leave floats out.
    """

    @special(func)
    def call(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        fit_outputs(d, func, args, kwargs)
        return d.run(func, args, kwargs)


for _func in (aten.arange.out, aten.arange.start_out, aten.range.out):
    _fitted_first(_func)


class ResizeOutputs:
    """The :class:`OutputPolicy` that resizes ``out=`` tensors as PyTorch does."""

    fit = staticmethod(fit_outputs)
    fill = staticmethod(fill_outputs)
