"""torch.save and torch.load: the files that a CUDA device would write, readable by any PyTorch."""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from typing import Any

import torch

from . import connection, names
from .records import READ
from .tensor import RemoteTensor, Storage, address, geometry, retarget


class HostCopy(torch.UntypedStorage):
    """A storage's bytes on the host, which say on which device they belong."""

    #: where a program sees its tensors; decides the tag in the file
    where: torch.device
    #: the same bytes on the slice, once some tensor needs them there
    remote: Storage | None

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    def data_ptr(self) -> int:
        """As unique, and as little of an address, as a remote tensor's own."""
        return super().data_ptr() if self.remote is None else address(self.remote)

    def memory(self) -> memoryview:
        n = self.nbytes()
        if not n:
            return memoryview(b"")
        return memoryview((ctypes.c_char * n).from_address(super().data_ptr())).cast("B")


#: By storage number: while a save runs, tensors on one storage share one copy, as the file does.
_copies: weakref.WeakValueDictionary[int, HostCopy] = weakref.WeakValueDictionary()


def storage_of(t: RemoteTensor) -> HostCopy:
    """A copy of the whole storage that ``t`` lies on; one copy for all who ask while it lives."""
    storage: Storage = t._storage
    copy = _copies.get(storage.id)
    if copy is None:
        copy = HostCopy(storage.nbytes)
        copy.where, copy.remote = t.device, storage
        _copies[storage.id] = copy
    # The device's memory may have changed since the copy was made.
    line = geometry((storage.nbytes,), (1,), 0, torch.uint8, storage.index)
    storage.stream.ask((READ, storage.id, line.wire()), copy.memory())
    return copy


def reduce(t: RemoteTensor) -> tuple:
    """How a remote tensor is saved: as any tensor, its storage tagged with the device's name."""
    if isinstance(t, torch.nn.Parameter):
        return torch._utils._rebuild_parameter, (t.data, t.requires_grad, OrderedDict())
    storage = torch.storage.TypedStorage(wrap_storage=storage_of(t), dtype=t.dtype, _internal=True)
    geom = t._geometry
    return (
        torch._utils._rebuild_tensor_v2,
        (storage, geom.offset, tuple(geom.size), tuple(geom.stride), t.requires_grad, OrderedDict()),
    )


def _reduce_ex(t: RemoteTensor, protocol: Any) -> tuple:
    return reduce(t)


def restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """torch.load's question: should this storage, tagged ``location``, live on a slice?"""
    if location == "cpu" or not names.count:
        return None
    try:
        device = torch.device(location)
    except RuntimeError:
        return None
    index = names.slice_index(device)
    if index is None:
        return None
    copy = HostCopy(storage.nbytes())
    copy.where, copy.remote = torch.device(device.type, index), None
    if storage.nbytes():
        ctypes.memmove(torch.UntypedStorage.data_ptr(copy), storage.data_ptr(), storage.nbytes())
    return copy


def set_storage(t: RemoteTensor, copy: HostCopy, offset: int, size: Any, stride: Any) -> RemoteTensor:
    """``t.set_(storage, …)`` for a storage that was loaded; the first tensor on it uploads it."""
    index = names.slice_index(copy.where)
    assert index is not None
    if copy.remote is None:
        stream = connection.stream(index)
        copy.remote = stream.allocate(copy.nbytes(), index)
        if copy.nbytes():
            line = geometry((copy.nbytes(),), (1,), 0, torch.uint8, index)
            stream.upload(copy.remote, line, copy.memory())
    retarget(t, copy.remote, geometry(size, stride, offset, t.dtype, index, copy.where.type == "cuda"))
    return t


def _set(
    t: RemoteTensor, source: Any = None, storage_offset: int = 0, size: Any = None, stride: Any = None
) -> torch.Tensor:
    """``Tensor.set_`` of remote tensors."""
    if isinstance(source, torch.TypedStorage):
        source = source._untyped_storage
    if isinstance(source, HostCopy):
        if size is None:
            size, stride = (source.nbytes() // t.dtype.itemsize,), (1,)
        return set_storage(t, source, storage_offset, size, stride)
    if source is None:
        return _torch_set(t)
    return _torch_set(t, source) if size is None else _torch_set(t, source, storage_offset, size, stride)


_torch_set: Any = torch.Tensor.set_


def register() -> None:
    """Give remote tensors storages that can be saved, and torch.load the way back."""
    RemoteTensor.untyped_storage = storage_of  # type: ignore[assignment, method-assign]
    RemoteTensor.set_ = _set  # type: ignore[assignment, method-assign]
    RemoteTensor.__reduce_ex__ = _reduce_ex  # type: ignore[assignment, method-assign]
    # Before PyTorch's own packages, whose answer for `cuda` would need CUDA.
    torch.serialization.register_package(5, lambda storage: None, restore)  # type: ignore[arg-type]
