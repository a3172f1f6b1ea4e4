"""A worker's storages: the memory of a client's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .device import Device
from .recurrent import Saved
from .templates import Geometry, nbytes_of

if TYPE_CHECKING:
    from .residence import Copy
    from .shared_storages import SharedBlock


class Poisoned(Exception):
    """An input is the result of an operator that failed. That failure has been reported already."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report


class StaleTensorError(Poisoned):
    """The session has no such storage: most likely the tensor belongs to a lease that has ended."""

    def __init__(self) -> None:
        super().__init__(
            {
                "operator": None,
                "type": "RuntimeError",
                "message": "this tensor belongs to a lease that has ended, or to a worker that was replaced, so its "
                "elements are lost; create it again",
            }
        )


class BeyondStorage(RuntimeError):
    """A tensor needs more bytes than its storage has: the program resized the storage to fewer."""


#: The report of calls that read or write what a forward pass saved.
_NO_ELEMENTS = {
    "operator": None,
    "type": "RuntimeError",
    "message": "this is what a forward pass saved for its backward pass; it has no elements to read or write",
}


class Slot:
    """A storage of ``nbytes`` bytes: a tensor on it, and the views that were used so far.

    ``poison`` is the report of the operator that failed to create it; then there is no ``base``. Nor has one
    that stands for what a forward pass ``saved``: only its backward pass can use that.
    ``shared`` is the block behind it, if other processes of the lease use it too. ``copy`` is a copy of its memory in
    host memory; while that is all there is, there is no ``base`` either, see residence.py.
    """

    __slots__ = ("base", "copy", "views", "device", "nbytes", "poison", "saved", "shared")

    def __init__(
        self,
        base: torch.Tensor | None,
        device: Device,
        nbytes: int,
        poison: dict[str, Any] | None = None,
        saved: Saved | None = None,
    ) -> None:
        self.base = base
        self.views: dict[Geometry, torch.Tensor] = {}
        self.device = device
        self.nbytes = nbytes
        self.saved = saved
        self.poison = _NO_ELEMENTS if saved is not None else poison
        self.shared: SharedBlock | None = None
        self.copy: Copy | None = None

    def memory(self) -> torch.Tensor | None:
        """The tensor on it, which is brought back if it was away; None without one."""
        if self.base is None and self.copy is not None:
            self.copy.fetch()
        return self.base

    def view(self, geom: Geometry) -> torch.Tensor:
        """The tensor of that layout. Raises :class:`Poisoned`."""
        found = self.views.get(geom)
        if found is None:
            if self.poison is not None:
                raise Poisoned(self.poison)
            base = self.memory()
            assert base is not None, "only a poisoned storage has none"
            size, stride, offset, dtype, _ = geom
            if dtype == base.dtype:
                found = base.as_strided(size, stride, offset)
            else:
                blank = torch.empty(0, dtype=dtype, device=base.device)
                found = blank.set_(base.untyped_storage(), offset, size, stride)
            self.views[geom] = found
        return found


def whole(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage, as a tensor on it."""
    blank = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return blank.set_(storage, 0, (storage.nbytes(),), (1,))


def within(slot: Slot, geom: Geometry) -> None:
    """Raise :class:`BeyondStorage` if a tensor of that layout exceeds its storage."""
    if slot.poison is None and nbytes_of(geom) > slot.nbytes:
        raise BeyondStorage(
            f"this tensor needs {nbytes_of(geom)} bytes, but its storage has {slot.nbytes}; resize it with "
            "untyped_storage().resize_() before you use the tensor"
        )
