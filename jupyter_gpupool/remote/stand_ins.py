"""What PyTorch's core is given in a generator's place, and whose place that is."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

#: PyTorch's own class; ``torch.Generator`` is ours while a lease is attached.
Native: Any = torch._C.Generator


class OnSlice(Protocol):
    """A generator of ours: see generators.py."""

    handle: int
    device: torch.device

    def held(self) -> Any: ...


_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(stand_in: Any, owner: OnSlice) -> None:
    _owners[stand_in._cdata] = owner


def owner(generator: Any) -> Any:
    """The slice's generator that it stands for; None where it is PyTorch's own."""
    return _owners.get(generator._cdata)


def handle(generator: Any) -> int:
    """What the worker knows a generator by. Raises RuntimeError for one that is no slice's."""
    owner = _owners.get(generator._cdata)
    if owner is None:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    owner.held()
    return owner.handle
