"""torch.save and torch.load: files that any PyTorch reads, as if a CUDA device had written them."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch

from . import names, operators
from .tensor import BACKEND, RemoteTensor, Storage, geometry, make

#: While a save runs, tensors on one storage must share one host copy: files keep that sharing.
_host_copies: weakref.WeakValueDictionary[int, HostCopy] = weakref.WeakValueDictionary()


class HostCopy(torch.UntypedStorage):
    """A storage's bytes on the host, which still says on which device they belong."""

    _where: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._where


def _host_copy(nbytes: int, where: torch.device) -> HostCopy:
    copy = HostCopy(nbytes)
    copy._where = where
    return copy


def storage_of(t: RemoteTensor) -> torch.UntypedStorage:
    """The bytes of the storage that ``t`` lies on."""
    storage: Storage = t._storage
    copy = _host_copies.get(storage.id)
    if copy is None:
        copy = _host_copy(storage.nbytes, t.device)
        if storage.nbytes:
            line = geometry((storage.nbytes,), (1,), 0, torch.uint8, storage.index)
            flat = torch.empty(0, dtype=torch.uint8).set_(_plain(copy))  # type: ignore[call-overload]
            with torch.no_grad():
                flat.copy_(make(storage, line))
        _host_copies[storage.id] = copy
    return copy


def _plain(copy: HostCopy) -> torch.UntypedStorage:
    copy.__class__ = torch.UntypedStorage
    return copy


def reduce(t: RemoteTensor) -> Any:
    """How a remote tensor is saved: as PyTorch saves any tensor, its storage tagged with the device."""
    storage = torch.storage.TypedStorage(wrap_storage=storage_of(t), dtype=t.dtype, _internal=True)
    arguments = (storage, t.storage_offset(), tuple(t.size()), t.stride(), t.requires_grad, OrderedDict())
    if isinstance(t, torch.nn.Parameter):
        plain = torch._utils._rebuild_tensor_v2, (*arguments[:4], False, OrderedDict())
        raise NotImplementedError(plain)
    return torch._utils._rebuild_tensor_v2, arguments


BACKEND_TAGS = (BACKEND, "cuda")
__all__ = ["reduce", "storage_of", "names", "operators"]
