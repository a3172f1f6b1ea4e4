"""A tensor whose elements live in a worker: the client keeps its geometry and a storage's number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import names, printing
from .memory import needed_bytes
from .names import BACKEND

if TYPE_CHECKING:
    from .stream import Stream


class Geometry:
    """Size, stride, offset, dtype and device of a tensor, interned: equal geometries are one object.

    ``index`` counts the lease's slices from 0. ``cuda`` says under which name the tensor was asked
    for: ``cuda:1`` and ``gpupool:1`` are the same slice, and a tensor keeps the name that its
    program used.
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
        self, size: tuple, stride: tuple, offset: int, dtype: torch.dtype, index: int, cuda: bool
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
        """A meta tensor of this geometry; the same one each time, so never resize it."""
        if self.meta is None:
            self.meta = self.new_meta()
        return self.meta

    def new_meta(self) -> torch.Tensor:
        base = torch.empty(self.nbytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return base.as_strided(self.size, self.stride, self.offset)

    def wire(self) -> list:
        """What the worker is told of it: ``[size, stride, offset, dtype name, device index]``."""
        return [self.size, self.stride, self.offset, dtype_name(self.dtype), self.index]

    def numel(self) -> int:
        n = 1
        for s in self.size:
            n *= s
        return n

    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride)):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True


_geometries: dict[tuple, Geometry] = {}


def geometry(
    size: Any, stride: Any, offset: int, dtype: torch.dtype, index: int, cuda: bool = False
) -> Geometry:
    """The one Geometry object with these values (sizes and strides in elements)."""
    key = (tuple(size), tuple(stride), offset, dtype, index, cuda)
    found = _geometries.get(key)
    if found is None:
        found = _geometries.setdefault(key, Geometry(*key))
    return found


def forget_geometries() -> None:
    """Drop the intern table; geometries still in use live on, unequal to later twins (only slower)."""
    _geometries.clear()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


class Storage:
    """One block of device memory in the worker. Frees it when the last tensor on it is gone."""

    __slots__ = ("id", "nbytes", "index", "stream", "__weakref__")

    def __init__(self, id: int, nbytes: int, index: int, stream: Stream) -> None:
        self.id = id
        self.nbytes = nbytes
        self.index = index
        self.stream = stream

    def __del__(self) -> None:
        self.stream.free(self)


def address(storage: Storage) -> int:
    """What stands for a storage's address: far enough from every other's."""
    return storage.id << 40 if storage.nbytes else 0


def make(storage: Storage, geom: Geometry) -> RemoteTensor:
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


def make_view(source: RemoteTensor, geom: Geometry) -> RemoteTensor:
    """A new tensor on the storage of ``source``, which in inference mode is of its kind, as with any device."""
    if _inference_mode() and not source.is_inference():
        with torch.inference_mode(False):
            return make(source._storage, geom)
    return make(source._storage, geom)


_inference_mode = torch.is_inference_mode_enabled


def retarget(t: RemoteTensor, storage: Storage, geom: Geometry) -> None:
    """Make ``t`` show another geometry (``resize_``, ``t_``, ``set_``): the same Python object."""
    _set_data(t, make(storage, geom))
    t._storage = storage
    t._geometry = geom


_NO_MEMORY_HERE = "the memory of a leased GPU cannot be shared with other libraries; copy with .cpu() first"


class RemoteTensor(torch.Tensor):
    """The device's tensor type. Programs never name it; they see ``device="cuda:0"``."""

    _storage: Storage
    _geometry: Geometry

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True, **ignored: Any) -> Any:
        """Libraries make parameters anew as ``type(parameter)(data, requires_grad=…)``."""
        return torch.nn.Parameter(data, requires_grad)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError("the gpupool device is not active in this process")

    # What Python code asks of a tensor, answered from what the client knows.

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._geometry.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self._geometry.cuda

    @property
    def is_gpupool(self) -> bool:
        return True

    @property
    def data(self) -> torch.Tensor:
        return _get_data(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if type(value) is not RemoteTensor:
            raise RuntimeError(
                f"cannot put data of device {value.device} into a tensor of device {self.device}; "
                "use .to() or copy_()"
            )
        _set_data(self, value)
        self._storage = value._storage
        self._geometry = value._geometry

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = self._at_home(args, kwargs)
        return _to(self, *args, **kwargs)

    def _at_home(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """``cuda:1`` and ``gpupool:1`` are one place: name it as PyTorch's core knows this tensor."""
        if args and isinstance(args[0], (str, torch.device, int)) and not isinstance(args[0], bool):
            index = names.slice_index(args[0])
            if index is not None:
                args = (torch.device(BACKEND, index), *args[1:])
        elif kwargs.get("device") is not None:
            index = names.slice_index(kwargs["device"])
            if index is not None:
                kwargs = {**kwargs, "device": torch.device(BACKEND, index)}
        elif args and isinstance(args[0], RemoteTensor):
            other = args[0]
            args = (other._geometry.real_device, other.dtype, *args[1:])
        return args, kwargs

    def cuda(  # type: ignore[override]
        self, device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        return self.to(torch.device(BACKEND, names.current_index()) if device is None else device, **kwargs)

    def get_device(self) -> int:
        return self._geometry.index

    def data_ptr(self) -> int:
        """A number as unique as an address; there is nothing to read there."""
        geom = self._geometry
        if not geom.numel():
            return 0
        return address(self._storage) + geom.offset * geom.dtype.itemsize

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
        """A compiled backward pass takes a remote tensor where it saw a plain one, see capture.py."""
        return self

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
                "protocol at the moment."
            )
        with torch.no_grad():
            copy: torch.Tensor = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        else:
            copy.requires_grad_(self.requires_grad)
        if self.grad is not None:
            copy.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = copy
        return copy


_make_wrapper = torch.Tensor._make_wrapper_subclass
_get_data = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_set_data = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_to = torch.Tensor.to
