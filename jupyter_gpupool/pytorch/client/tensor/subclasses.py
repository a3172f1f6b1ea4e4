"""Subclasses of ``torch.Tensor`` and ``nn.Parameter`` on a slice.

A tensor on a slice has to be a :class:`RemoteTensor`, whose operators PyTorch hands to the client. A tensor of
the program's own class ``S`` becomes one of a class that is made here, which inherits from ``S`` and from
RemoteTensor: ``isinstance(t, S)`` holds, and the methods and ``__torch_function__`` of ``S`` are called.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.client import (
    MAKE_SUBCLASS,
    DisableTorchFunctionSubclass,
    disabled_torch_function,
    make_subclass,
    make_wrapper_subclass,
)

from .patches import Patches
from .tensor import RemoteTensor, Storage, TensorLayout, make, make_view, retarget

#: What a slice's tensor needs of itself. Everything else in its ``__dict__`` belongs to the program.
OWN_ATTRIBUTES = frozenset({"_storage", "_geometry", "_is_param"})

_leased: dict[type, type[RemoteTensor]] = {torch.Tensor: RemoteTensor, torch.nn.Parameter: RemoteTensor}
_homes: dict[type, type] = {}
_wanted = threading.local()


def leased_class(home: type) -> type[RemoteTensor]:
    """The class on a slice of a tensor whose class on the CPU is ``home``."""
    if issubclass(home, RemoteTensor):
        return home
    found = _leased.get(home)
    if found is None:
        found = _leased[home] = _make_class(home)
        _homes[found] = home
    return found


def home_class(t: torch.Tensor) -> type:
    """The class that ``t`` has on the CPU."""
    kind = type(t)
    if kind is RemoteTensor:
        return torch.nn.Parameter if isinstance(t, torch.nn.Parameter) else torch.Tensor
    return _homes.get(kind, kind)


def attributes(t: torch.Tensor) -> dict[str, Any]:
    """The attributes that the program has set on ``t``."""
    return {name: value for name, value in t.__dict__.items() if name not in OWN_ATTRIBUTES}


def make_of_class(home: type, storage: Storage, geom: TensorLayout) -> RemoteTensor:
    """A new tensor on ``storage`` whose class on the CPU is ``home``."""
    kind = leased_class(home)
    t = make(storage, geom) if kind is RemoteTensor else _make_wrapper(kind, storage, geom)
    if issubclass(home, torch.nn.Parameter):
        t._is_param = True
    return t


def _make_wrapper(kind: type[RemoteTensor], storage: Storage, geom: TensorLayout) -> RemoteTensor:
    t: RemoteTensor = make_wrapper_subclass(
        kind,
        geom.size,
        strides=geom.stride,
        storage_offset=geom.offset,
        dtype=geom.dtype,
        device=geom.real_device,
    )
    t._storage, t._geometry = storage, geom
    return t


def new_alias(source: RemoteTensor) -> RemoteTensor:
    """What ``aten::alias`` returns: a view of ``source``, of the class that :func:`as_subclass` asks for."""
    home = getattr(_wanted, "home", None)
    if home is None:
        return make_view(source, source._geometry)
    return make_of_class(home, source._storage, source._geometry)


def as_subclass(t: RemoteTensor, cls: type) -> torch.Tensor:
    """``Tensor.as_subclass`` of remote tensors; differentiable, as PyTorch's."""
    _wanted.home = _homes.get(cls, cls)
    try:
        with DisableTorchFunctionSubclass():
            found: torch.Tensor = torch.ops.aten.alias.default(t)
    finally:
        _wanted.home = None
    return found


def _make_class(home: type) -> type[RemoteTensor]:
    function = home.__torch_function__  # type: ignore[attr-defined]
    members: dict[str, Any] = {
        "__module__": home.__module__,
        "__qualname__": home.__qualname__,
        "__torch_function__": disabled_torch_function
        if function is disabled_torch_function
        else classmethod(_torch_function),
        "__torch_dispatch__": classmethod(_torch_dispatch),
    }
    if issubclass(home, torch.nn.Parameter):
        # Parameter stands before RemoteTensor in the order of the bases, and these of it suit the CPU only.
        for name in ("__deepcopy__", "__repr__", "__reduce_ex__"):
            if getattr(home, name) is vars(torch.nn.Parameter)[name]:
                members[name] = vars(RemoteTensor)[name]
    become = getattr(home, "cls_to_become", None)  # of uninitialized parameters and buffers
    if become is not None:
        members["cls_to_become"] = leased_class(become)
    return type(home)(home.__name__, (home, RemoteTensor), members)


def _torch_function(
    cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    home = _homes[cls]
    known = tuple(_homes.get(kind, kind) for kind in types)
    return home.__torch_function__(func, known, args, kwargs or {})  # type: ignore[attr-defined]


def _torch_dispatch(
    cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """Call an operator with plain remote tensors in the place of those of a subclass."""
    twins: dict[int, tuple[RemoteTensor, RemoteTensor]] = {}
    originals: dict[int, RemoteTensor] = {}
    args = _plain(args, twins)
    kwargs = {name: _plain(value, twins) for name, value in (kwargs or {}).items()}
    result = RemoteTensor.__torch_dispatch__(func, (RemoteTensor,), args, kwargs)
    for original, twin in twins.values():
        originals[id(twin)] = original
        if twin._storage is not original._storage or twin._geometry is not original._geometry:
            retarget(original, twin._storage, twin._geometry)
    return _original(result, originals)


def _plain(value: Any, twins: dict[int, tuple[RemoteTensor, RemoteTensor]]) -> Any:
    if isinstance(value, RemoteTensor):
        if type(value) is RemoteTensor:
            return value
        pair = twins.get(id(value))
        if pair is None:
            pair = twins[id(value)] = value, make_view(value, value._geometry)
        return pair[1]
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(v, twins) for v in value])
    return value


def _original(value: Any, originals: dict[int, RemoteTensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_original(v, originals) for v in value])
    return originals.get(id(value), value)


def alias(patches: Patches) -> None:
    """Let the constructors of subclasses accept tensors on a slice."""
    new_parameter: Any = torch.nn.Parameter.__new__

    @functools.wraps(make_subclass)
    def make(cls: type, data: torch.Tensor, require_grad: bool = False, **options: Any) -> torch.Tensor:
        if not isinstance(data, RemoteTensor):
            return make_subclass(cls, data, require_grad, **options)
        made = make_of_class(_homes.get(cls, cls), data._storage, data._geometry)
        with DisableTorchFunctionSubclass():
            return made.requires_grad_(require_grad)

    @functools.wraps(new_parameter)
    def new(cls: type, data: Any = None, requires_grad: bool = True) -> torch.Tensor:
        if cls is not torch.nn.Parameter and isinstance(data, RemoteTensor):
            return make(cls, data, requires_grad)
        return new_parameter(cls, data, requires_grad)

    patches.set(*MAKE_SUBCLASS, staticmethod(make))
    patches.set(torch.nn.Parameter, "__new__", staticmethod(new))


def register() -> None:
    """Let remote tensors become tensors of a subclass."""
    RemoteTensor.as_subclass = as_subclass  # type: ignore[assignment, method-assign]
