"""A worker's storages: the memory that a client's tensors are on, and the tensors that were asked for so far."""

from __future__ import annotations

import torch

from .program import BadRecord, Geometry, nbytes_of
from .slices import Device


class Poisoned(Exception):
    """An input is the result of an operator that failed; that failure has been reported already."""

    def __init__(self, report: dict) -> None:
        self.report = report


class Stray(Poisoned):
    """A tensor that this session does not hold: most likely one of a lease that has ended."""

    def __init__(self) -> None:
        super().__init__(
            {
                "operator": None,
                "type": "RuntimeError",
                "message": "a tensor of a lease that has ended: its elements are lost; make it anew",
            }
        )


class Slot:
    """A storage: a tensor on all of it, and the views of it that were asked for so far."""

    __slots__ = ("base", "views", "device", "nbytes", "poison")

    def __init__(
        self, base: torch.Tensor | None, device: Device, nbytes: int, poison: dict | None = None
    ) -> None:
        self.base = base
        self.views: dict[Geometry, torch.Tensor] = {}
        self.device = device
        self.nbytes = nbytes
        self.poison = poison

    def view(self, geom: Geometry) -> torch.Tensor:
        found = self.views.get(geom)
        if found is None:
            if self.poison is not None:
                raise Poisoned(self.poison)
            base = self.base
            assert base is not None
            size, stride, offset, dtype, _ = geom
            if dtype == base.dtype:
                found = base.as_strided(size, stride, offset)
            else:
                blank = torch.empty(0, dtype=dtype, device=base.device)
                found = blank.set_(base.untyped_storage(), offset, size, stride)
            self.views[geom] = found
        return found


def within(slot: Slot, geom: Geometry) -> None:
    if slot.poison is None and nbytes_of(geom) > slot.nbytes:
        raise BadRecord(f"a tensor of {nbytes_of(geom)} bytes on a storage of {slot.nbytes}")
