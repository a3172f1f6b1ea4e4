"""``UntypedStorage`` of a slice: the memory that tensors are views of, as a Python object."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment, resizing
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.client.tensor.tensor import (
    RemoteTensor,
    Storage,
    address,
    geometry,
    make,
    retarget,
)
from jupyter_gpupool.pytorch.torch_internals.client import NEW_WRAPPED_STORAGE
from jupyter_gpupool.pytorch.torch_internals.client import new_storage as _new_native


class RemoteStorage(torch.UntypedStorage):
    """A storage on a slice. Its own memory in this process is empty: each method asks the worker."""

    #: the device by the name that the program uses
    _device: torch.device
    remote: Storage

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device

    @property
    def _cdata(self) -> int:
        """What tells storages apart: as long as a tensor is on it, a storage keeps this number."""
        return id(self.remote)

    def nbytes(self) -> int:
        return self.remote.nbytes

    def __len__(self) -> int:
        return self.remote.nbytes

    def data_ptr(self) -> int:
        """A number as unique as an address, as of a remote tensor."""
        return address(self.remote)

    def resizable(self) -> bool:
        return self.remote not in resizing.received

    def is_shared(self) -> bool:
        return True

    # -- elements

    def bytes_tensor(self) -> torch.Tensor:
        """The storage as a tensor of bytes."""
        index = self.remote.index
        line = geometry((self.nbytes(),), (1,), 0, torch.uint8, index, self._device.type == "cuda")
        return make(self.remote, line)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError(
                "a slice of a storage on a leased GPU cannot be a storage; use a tensor instead: "
                "torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[…]"
            )
        return int(self.bytes_tensor()[self._checked(index)].item())

    def __setitem__(self, index: Any, value: int) -> None:
        self.bytes_tensor()[index if isinstance(index, slice) else self._checked(index)] = value

    def _checked(self, index: int) -> int:
        if not -self.nbytes() <= index < self.nbytes():
            raise IndexError(f"index {index} out of range for storage of size {self.nbytes()}")
        return index

    def tolist(self) -> list[int]:
        found: list[int] = self.bytes_tensor().tolist()
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __repr__(self) -> str:
        elements = "\n ".join(map(str, self.tolist()))
        return f" {elements}\n[{torch.typename(self)}(device={self.device}) of size {len(self)}]"

    def fill_(self, value: int) -> RemoteStorage:
        self.bytes_tensor().fill_(value)
        return self

    def copy_(self, source: Any, non_blocking: bool | None = None) -> RemoteStorage:  # type: ignore[override]
        source = getattr(source, "_untyped_storage", source)
        _check_size(self, source)
        self.bytes_tensor().copy_(bytes_tensor(source))
        return self

    def _byteswap(self, element_size: int) -> None:
        rows = self.bytes_tensor().view(-1, element_size)
        rows.copy_(rows.flip(1))

    # -- whole storages

    def clone(self) -> RemoteStorage:
        return new(self.nbytes(), self._device).copy_(self)

    def new(self) -> RemoteStorage:
        return new(0, self._device)

    def resize_(self, size: int) -> RemoteStorage:
        """Change the size to ``size`` bytes. Tensors on the storage stay on it; it gets another address.

        Raises RuntimeError, as with CUDA, for a storage that another process has sent.
        """
        if size < 0:
            raise RuntimeError(f"a storage cannot have {size} bytes")
        resizing.resize_storage(attachment.dispatcher(self.remote.index), self.remote, size)
        return self

    # -- files

    def _write_file(self, *args: Any) -> None:
        self.cpu()._write_file(*args)

    def _set_from_file(self, *args: Any) -> RemoteStorage:
        read = torch.UntypedStorage(self.nbytes())
        read._set_from_file(*args)
        return self.copy_(read)


# torch.save() writes the name of a storage's class, which other processes look up.
RemoteStorage.__name__ = RemoteStorage.__qualname__ = "UntypedStorage"
RemoteStorage.__module__ = torch.UntypedStorage.__module__

#: By the identity of the Storage, so that `x.untyped_storage() is x.untyped_storage()` while one is in use.
_objects: weakref.WeakValueDictionary[int, RemoteStorage] = weakref.WeakValueDictionary()

_copy_native: Any = torch.UntypedStorage.copy_
_set_native: Any = torch.Tensor.set_


def of_storage(storage: Storage, device: torch.device) -> RemoteStorage:
    """The object of ``storage``, whose device the program calls ``device``."""
    found = _objects.get(id(storage))
    if found is None:
        # On "meta", PyTorch's C++ refuses it where it expects memory.
        found = _new_native(RemoteStorage, 0, device="meta")
        found.remote, found._device = storage, device
        _objects[id(storage)] = found
    return found


def storage_of(t: RemoteTensor) -> RemoteStorage:
    """``t.untyped_storage()``."""
    return of_storage(t._storage, t._geometry.device)


def new(nbytes: int, device: torch.device) -> RemoteStorage:
    """A storage of ``nbytes`` bytes with arbitrary content."""
    index = device_names.slice_index(device)
    assert index is not None
    place = torch.device(device.type, index)
    return of_storage(attachment.stream(index).allocate(nbytes, index), place)


def bytes_tensor(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage of any device as a tensor of bytes."""
    if isinstance(storage, RemoteStorage):
        return storage.bytes_tensor()
    return _set_native(torch.empty(0, dtype=torch.uint8, device=storage.device), storage)


def set_tensor(
    t: RemoteTensor, source: Any = None, storage_offset: int = 0, size: Any = None, stride: Any = None
) -> torch.Tensor:
    """``Tensor.set_`` of remote tensors. Offset, size and stride are in elements of the dtype of ``t``."""
    source = getattr(source, "_untyped_storage", source)
    if isinstance(source, torch.UntypedStorage):
        if not isinstance(source, RemoteStorage):
            raise _wrong_device(t, source)
        if size is None:
            size, stride = (source.nbytes() // t.dtype.itemsize,), (1,)
        elif stride is None:
            stride = torch.empty(size, device="meta").stride()
        device = source.device
        geom = geometry(size, stride, storage_offset, t.dtype, source.remote.index, device.type == "cuda")
        if geom.numel() and geom.nbytes > source.nbytes():
            source.resize_(geom.nbytes)
        retarget(t, source.remote, geom)
        return t
    if source is None:
        return _set_native(t)
    return _set_native(t, source) if size is None else _set_native(t, source, storage_offset, size, stride)


def _check_size(storage: torch.UntypedStorage, source: torch.UntypedStorage) -> None:
    here, there = storage.nbytes(), source.nbytes()
    if here != there:
        raise RuntimeError(f"size does not match, self was {here} bytes but src was {there} bytes")


def _wrong_device(t: torch.Tensor, storage: torch.UntypedStorage) -> RuntimeError:
    return RuntimeError(
        f'Attempted to set the storage of a tensor on device "{t.device}" to a storage on different device '
        f'"{storage.device}".  This is no longer allowed; the devices must match.'
    )


def alias(patches: Patches) -> None:
    """Let PyTorch's storage classes make storages on a slice, and copy from them."""

    def make_storage(cls: type, *args: Any, device: Any = None, **options: Any) -> torch.UntypedStorage:
        if device is None or device_names.slice_index(device) is None:
            return _new_native(cls, *args, device=device, **options)
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        given = args[0] if args else options.get("size", 0)
        if isinstance(given, int):
            return new(given, place)
        made = new(len(given), place)
        return made.copy_(torch.UntypedStorage(given)) if len(given) else made

    def copy(
        self: torch.UntypedStorage, source: Any, non_blocking: bool | None = None
    ) -> torch.UntypedStorage:
        untyped = getattr(source, "_untyped_storage", source)
        if not isinstance(untyped, RemoteStorage):
            return _copy_native(self, source, non_blocking)
        _check_size(self, untyped)
        bytes_tensor(self).copy_(untyped.bytes_tensor())
        return self

    def set_(self: torch.Tensor, source: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        untyped = getattr(source, "_untyped_storage", source)
        if isinstance(untyped, RemoteStorage) and not isinstance(self, RemoteTensor):
            raise _wrong_device(self, untyped)
        return _set_native(self, *(() if source is None else (source,)), *args, **kwargs)

    is_storage = torch.is_storage
    wrap = NEW_WRAPPED_STORAGE.value

    def new_wrapped(self: torch.TypedStorage, storage: torch.UntypedStorage) -> torch.TypedStorage:
        if not isinstance(storage, RemoteStorage):
            return wrap(self, storage)
        if type(self) is torch.TypedStorage:
            return torch.TypedStorage(wrap_storage=storage, dtype=self.dtype, _internal=True)
        return type(self)(wrap_storage=storage)

    @functools.wraps(is_storage)
    def is_any_storage(obj: Any) -> bool:
        return isinstance(obj, RemoteStorage) or is_storage(obj)

    # torch.save() asks this. PyTorch's own compares classes.
    patches.set(torch, "is_storage", is_any_storage)
    # It compares the class of the storage.
    patches.set(*NEW_WRAPPED_STORAGE, new_wrapped)
    patches.set(torch.UntypedStorage, "__new__", staticmethod(make_storage))
    patches.set(torch.UntypedStorage, "copy_", copy)
    patches.set(torch.Tensor, "set_", set_)


def register() -> None:
    """Let remote tensors give out their storage."""
    RemoteTensor.untyped_storage = storage_of  # type: ignore[assignment, method-assign]
    RemoteTensor.set_ = set_tensor  # type: ignore[assignment, method-assign]
