"""A tensor whose elements are in a worker. The client keeps its layout and the number of its storage."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from jupyter_gpupool.pytorch.protocol.sizes import needed_bytes
from jupyter_gpupool.pytorch.torch_internals.client import disabled_torch_function
from jupyter_gpupool.pytorch.torch_internals.client import make_wrapper_subclass as _make_wrapper

from . import device_names, printing
from .device_names import BACKEND


class TensorLayout:
    """Size, stride, offset, dtype and device of a tensor. Equal layouts are one object: use :func:`geometry`.

    Sizes, strides and the offset are in elements. ``index`` counts the lease's slices from 0. ``cuda`` is
    whether the program used the name ``cuda``: ``cuda:1`` and ``gpupool:1`` are the same slice, and a tensor
    keeps the name that its program used.
    """

    __slots__ = (
        "size",
        "stride",
        "offset",
        "dtype",
        "index",
        "cuda",
        "device",
        "real_device",
        "nbytes",
        "meta",
    )

    def __init__(
        self,
        size: tuple[Any, ...],
        stride: tuple[Any, ...],
        offset: int,
        dtype: torch.dtype,
        index: int,
        cuda: bool,
    ) -> None:
        self.size = size
        self.stride = stride
        self.offset = offset
        self.dtype = dtype
        self.index = index
        self.cuda = cuda
        self.real_device = torch.device(BACKEND, index)
        self.device = torch.device("cuda", index) if cuda else self.real_device
        #: bytes from the storage's start to the last element's end
        self.nbytes = needed_bytes(size, stride, offset, dtype.itemsize)
        self.meta: torch.Tensor | None = None

    def on_meta(self) -> torch.Tensor:
        """A meta tensor of this layout. Each call returns the same one, so do not resize it."""
        if self.meta is None:
            self.meta = self.new_meta()
        return self.meta

    def new_meta(self) -> torch.Tensor:
        """A meta tensor of this layout that the caller may change."""
        base = torch.empty(self.nbytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return base.as_strided(self.size, self.stride, self.offset)

    def wire(self) -> list[Any]:
        """The layout as commands carry it: ``[size, stride, offset, dtype name, device index]``."""
        return [self.size, self.stride, self.offset, dtype_name(self.dtype), self.index]

    def numel(self) -> int:
        """The number of elements."""
        n = 1
        for s in self.size:
            n *= s
        return n

    def is_contiguous(self) -> bool:
        """Whether the elements follow each other in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride)):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True


_geometries: dict[tuple[Any, ...], TensorLayout] = {}


def geometry(
    size: Any, stride: Any, offset: int, dtype: torch.dtype, index: int, cuda: bool = False
) -> TensorLayout:
    """The one TensorLayout with these values (sizes, strides and offset in elements)."""
    key = (tuple(size), tuple(stride), offset, dtype, index, cuda)
    found = _geometries.get(key)
    if found is None:
        found = _geometries.setdefault(key, TensorLayout(*key))
    return found


def forget_geometries() -> None:
    """Clear the table of layouts.

    A layout still in use stays valid, but is another object than a later one with the same values. That
    costs a prediction, no more.
    """
    _geometries.clear()


#: The dtypes of this release of PyTorch that a worker of another release lacks, by name.
lacking_dtypes: frozenset[str] = frozenset()


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``"float32"``. Raises RuntimeError for one that a worker lacks."""
    name = str(dtype)[6:]
    if name in lacking_dtypes:
        raise RuntimeError(
            f"the GPU server's PyTorch has no dtype {name}; use another one, or install the same release on both"
        )
    return name


class StorageOwner(Protocol):
    """What made a storage, and frees it in the worker."""

    def free(self, storage: Storage) -> None:
        """Free ``storage``. A destructor calls this in the middle of anything, so it must take no lock."""


class Storage:
    """One block of device memory in the worker: ``nbytes`` bytes on the slice ``index``.

    Its owner frees it when the last tensor on it is gone.
    """

    __slots__ = ("id", "nbytes", "index", "owner", "__weakref__")

    def __init__(self, id: int, nbytes: int, index: int, owner: StorageOwner) -> None:
        self.id = id
        self.nbytes = nbytes
        self.index = index
        self.owner = owner

    def __del__(self) -> None:
        self.owner.free(self)


class FreedStorage(Storage):
    """A storage that the program has resized to 0 bytes, though it has tensors with elements on it."""

    __slots__ = ()

    @property
    def id(self) -> int:  # type: ignore[override]
        raise RuntimeError(
            "the storage of this tensor was resized to 0 bytes; resize it with untyped_storage().resize_() "
            "before you use the tensor"
        )

    def __del__(self) -> None:
        self.__class__ = Storage  # type: ignore[assignment]
        self.owner.free(self)


def address(storage: Storage) -> int:
    """A number that serves as a storage's address, far from the addresses of all other storages."""
    return storage.id << 40 if storage.nbytes else 0


def make(storage: Storage, geom: TensorLayout) -> RemoteTensor:
    """A new tensor on ``storage``."""
    t = _make_wrapper(
        RemoteTensor,
        geom.size,
        strides=geom.stride,
        storage_offset=geom.offset,
        dtype=geom.dtype,
        device=geom.real_device,
    )
    t._storage = storage
    t._geometry = geom
    return t


def make_view(source: RemoteTensor, geom: TensorLayout) -> RemoteTensor:
    """A new tensor on the storage of ``source``. It is an inference tensor only if ``source`` is one."""
    if _inference_mode() and not source.is_inference():
        with torch.inference_mode(False):
            return make(source._storage, geom)
    return make(source._storage, geom)


_inference_mode = torch.is_inference_mode_enabled


def retarget(t: RemoteTensor, storage: Storage, geom: TensorLayout) -> None:
    """Give ``t`` another storage and layout (``resize_``, ``t_``, ``set_``); it stays the same Python object."""
    _set_data(t, make(storage, geom))
    t._storage = storage
    t._geometry = geom


_NO_MEMORY_HERE = (
    "the memory of this tensor is on a GPU server, so other libraries cannot share it; copy with .cpu() first"
)


class RemoteTensor(torch.Tensor):
    """The type of tensors on a slice. Programs do not name it; they see ``device="cuda:0"``."""

    _storage: Storage
    _geometry: TensorLayout

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True, **ignored: Any) -> Any:
        """Libraries copy parameters by ``type(parameter)(data, requires_grad=…)``."""
        return torch.nn.Parameter(data, requires_grad)

    __torch_function__ = disabled_torch_function

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            "the gpupool device is not active in this process, because no lease is attached to it; "
            "call jupyter_gpupool.attach() or use `gpupool run`"
        )

    # Attributes and methods that need nothing from the worker, or not the default way.

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._geometry.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self._geometry.cuda

    @property
    def is_gpupool(self) -> bool:
        return True

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = self._at_home(args, kwargs)
        return _to(self, *args, **kwargs)

    def _at_home(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``to()`` with the device named ``gpupool``, the only name that PyTorch's core knows."""
        if args and isinstance(args[0], (str, torch.device, int)) and not isinstance(args[0], bool):
            index = device_names.slice_index(args[0])
            if index is not None:
                args = (torch.device(BACKEND, index), *args[1:])
        elif kwargs.get("device") is not None:
            index = device_names.slice_index(kwargs["device"])
            if index is not None:
                kwargs = {**kwargs, "device": torch.device(BACKEND, index)}
        elif args and isinstance(args[0], RemoteTensor):
            other = args[0]
            args = (other._geometry.real_device, other.dtype, *args[1:])
        return args, kwargs

    def cuda(  # type: ignore[override]
        self, device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        return self.to(
            torch.device(BACKEND, device_names.current_index()) if device is None else device, **kwargs
        )

    def get_device(self) -> int:
        return self._geometry.index

    def data_ptr(self) -> int:
        """A number as unique as an address. No memory of this process is there."""
        geom = self._geometry
        if not geom.numel():
            return 0
        return address(self._storage) + geom.offset * geom.dtype.itemsize

    const_data_ptr = data_ptr

    def map_(self, *args: Any) -> Any:
        raise TypeError("map_ is only implemented on CPU tensors")

    def map2_(self, *args: Any) -> Any:
        raise TypeError("map2_ is only implemented on CPU tensors")

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def is_shared(self) -> bool:
        return True

    def share_memory_(self) -> RemoteTensor:
        return self

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().resolve_conj().resolve_neg().numpy()
        if self.requires_grad:
            raise RuntimeError(
                "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
            )
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    @property
    def __cuda_array_interface__(self) -> Any:
        raise AttributeError(_NO_MEMORY_HERE)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise BufferError(_NO_MEMORY_HERE)

    def __dlpack_device__(self) -> Any:
        raise BufferError(_NO_MEMORY_HERE)

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __format__(self, spec: str) -> str:
        if self.dim() == 0:
            return format(self.item(), spec)
        return object.__format__(self, spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return printing.describe(self)

    def __coerce_same_metadata_as_tangent__(self, meta: Any, kind: Any = None) -> RemoteTensor:
        """A compiled backward pass takes a remote tensor where it traced a plain one, see compile/backend.py."""
        return self


_set_data = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_to = torch.Tensor.to
