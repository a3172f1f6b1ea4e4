"""``torch.cuda.FloatTensor`` and the like, with which older programs create tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor

DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _TensorTypeMeta(type):
    dtype: torch.dtype

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, RemoteTensor) and instance.is_cuda and instance.dtype is cls.dtype

    def __str__(cls) -> str:
        return f"torch.cuda.{cls.__name__}"


def _kind(name: str, dtype: torch.dtype) -> type:
    def new(cls: type, *args: Any, device: Any = None) -> torch.Tensor:
        place = torch.device("cuda", device_names.current_index()) if device is None else torch.device(device)
        if not args:
            return torch.empty(0, dtype=dtype, device=place)
        first = args[0]
        if isinstance(first, (torch.TypedStorage, torch.UntypedStorage)):
            return torch.empty(0, dtype=dtype, device=place).set_(first)
        if isinstance(first, torch.Size) or all(isinstance(a, int) for a in args):
            return torch.empty(*args, dtype=dtype, device=place)
        if isinstance(first, torch.Tensor):
            if first.dtype is not dtype or not first.is_cuda:
                raise TypeError(f"expected torch.cuda.{name}Tensor (got {first.type()})")
            return first.detach()
        return torch.tensor(first, dtype=dtype, device=place)

    kind = _TensorTypeMeta(f"{name}Tensor", (), {"__new__": new, "__module__": "torch.cuda"})
    kind.dtype = dtype
    return kind


def alias(patches: Patches) -> None:
    """Provide the types, and their names in ``Tensor.type()``."""
    kinds = {f"torch.cuda.{name}Tensor": _kind(name, dtype) for name, dtype in DTYPES.items()}
    for spelled, kind in kinds.items():
        patches.set(torch.cuda, spelled.rsplit(".", 1)[1], kind)
    native = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        """The name of a tensor's type, or the tensor as another type."""
        if dtype is None:
            if type(self) is RemoteTensor and self.is_cuda and self.dtype in _NAMES:
                return f"torch.cuda.{_NAMES[self.dtype]}Tensor"
            return native(self)
        kind = kinds.get(dtype) if isinstance(dtype, str) else dtype
        if isinstance(kind, _TensorTypeMeta):
            place = self.device if self.is_cuda else torch.device("cuda", device_names.current_index())
            return self.to(place, kind.dtype, non_blocking=non_blocking)
        return native(self, dtype, non_blocking, **kwargs)

    patches.set(torch.Tensor, "type", type_)
    patches.set(torch, "set_default_tensor_type", _set_default(torch.set_default_tensor_type, kinds))


def _set_default(native: Callable[[Any], None], kinds: dict[str, type]) -> Callable[[Any], None]:
    """``torch.set_default_tensor_type``: a type of ``torch.cuda`` sets the default dtype and the default device."""
    ours = False

    @functools.wraps(native)
    def set_default_tensor_type(t: Any) -> None:
        nonlocal ours
        kind = kinds.get(t) if isinstance(t, str) else t
        if not isinstance(kind, _TensorTypeMeta):
            native(t)
            if ours:
                torch.set_default_device(None)
                ours = False
            return
        if not kind.dtype.is_floating_point:
            raise TypeError(
                "invalid type object: only floating-point types are supported as the default type"
            )
        torch.set_default_dtype(kind.dtype)
        torch.set_default_device("cuda")
        ours = True

    return set_default_tensor_type
