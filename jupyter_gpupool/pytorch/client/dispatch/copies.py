"""Operators that are not one call in the worker: copies to and from the host, values, and allocation."""

from __future__ import annotations

import threading
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.subclasses import new_alias
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor, geometry, make
from jupyter_gpupool.pytorch.protocol.commands import READ
from jupyter_gpupool.pytorch.protocol.sizes import host_bytes

from .dispatcher import Dispatcher, special

aten = torch.ops.aten

#: Where values arrive, for each thread and data type: (the tensor, its bytes).
_cells = threading.local()


def upload(d: Dispatcher, destination: RemoteTensor, source: torch.Tensor) -> None:
    """Copy the CPU tensor ``source`` into ``destination``, converted and broadcast as by ``copy_``."""
    geom = destination._geometry
    source = source.detach().resolve_conj().resolve_neg()
    source = source.to(geom.dtype).expand(geom.size).contiguous()
    d.stream.upload(destination._storage, geom, host_bytes(source))


def download(d: Dispatcher, source: RemoteTensor, destination: torch.Tensor) -> None:
    """Copy ``source`` into ``destination``, a CPU tensor of the same shape and of any dtype and strides.

    Only the elements of ``source`` cross the wire, not the rest of its storage.
    """
    if destination.device.type == "meta":
        return  # a meta tensor has no elements
    geom = source._geometry
    direct = destination.dtype == geom.dtype and destination.is_contiguous() and not destination.is_conj()
    target = destination if direct else torch.empty(geom.size, dtype=geom.dtype)
    d.stream.ask((READ, source._storage.id, geom.wire()), host_bytes(target))
    if not direct:
        destination.copy_(target)


@special(aten.copy_.default)
def _copy(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    destination, source = args[0], args[1]
    if isinstance(source, (int, float, complex)):
        return d.run(aten.fill_.Scalar, (destination, source), {})
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
    """Whether both are the same elements in the same order.

    PyTorch's composites with ``out=`` copy a view of the output back into it if they cannot see that it is a
    view, and they cannot see it of a tensor without memory in this process.
    """
    if a._storage is not b._storage:
        return False
    x, y = a._geometry, b._geometry
    return (
        (x.offset, x.dtype, x.numel()) == (y.offset, y.dtype, y.numel())
        and x.is_contiguous()
        and y.is_contiguous()
    )


@special(aten._to_copy.default)
def _to_copy(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    source: RemoteTensor = args[0]
    wanted = {k: v for k, v in kwargs.items() if k in ("dtype", "layout", "memory_format") and v is not None}
    device = kwargs.get("device")
    if device is None or device_names.slice_index(device) is not None:
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
def _value(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    geom = source._geometry
    known = _cells.__dict__.get(geom.dtype)
    if known is None:
        cell = torch.empty((), dtype=geom.dtype, device="cpu")
        known = _cells.__dict__[geom.dtype] = cell, host_bytes(cell)
    cell, view = known
    d.stream.ask((READ, source._storage.id, geom.wire()), view)
    return cell.item()


@special(aten._unsafe_view.default)
def _unsafe_view(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return d.run(aten.view.default, args, kwargs)


@special(aten.lift_fresh.default, aten.alias.default)
def _alias(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return new_alias(args[0])


@special(aten._conj.default)
def _conj(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    # A lazy conjugate is a bit of the client's tensor, which the worker does not get.
    return d.run(aten._conj_physical.default, args, {})


@special(aten._neg_view.default)
def _neg_view(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return d.run(aten.neg.default, args, {})


@special(aten.is_pinned.default)
def _is_pinned(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


@special(aten.record_stream.default)
def _record_stream(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Does nothing: storages are freed in the order of the stream anyway."""


# -- allocation


def empty(d: Dispatcher, size: Any, stride: Any, dtype: Any, device: torch.device) -> RemoteTensor:
    """A new tensor with arbitrary elements on the slice that ``device`` names; sizes and strides in elements."""
    index = device_names.slice_index(device)
    assert index is not None
    geom = geometry(
        size, stride, 0, dtype or torch.get_default_dtype(), index, device_names.says_cuda(device)
    )
    return make(d.stream.allocate(geom.nbytes, index), geom)


def _like(func: Any) -> None:
    """Register a handler of ``zeros_like`` and the like, which use only the layout of their tensor."""

    @special(func)
    def make_like(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        device = kwargs.get("device")
        if device is None or device_names.slice_index(device) is not None:
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

#: Operators that allocate, and use only the layout of their tensor.
ALLOCATES = (aten.new_empty.default, aten.empty_like.default, aten.new_empty_strided.default)


@special(*ALLOCATES)
def _new_empty(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    source: RemoteTensor = args[0]
    name = {3: aten.new_empty_strided.default, 2: aten.new_empty.default}.get(
        len(args), aten.empty_like.default
    )
    wanted = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
    shape = name(source._geometry.on_meta(), *args[1:], **wanted)
    device = kwargs.get("device")
    if device is not None and device_names.slice_index(device) is None:
        return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
    return empty(d, shape.shape, shape.stride(), shape.dtype, source.device if device is None else device)
