"""PyTorch's own generators that stand for a slice's: PyTorch's core accepts no others."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch


class OnSlice(Protocol):
    """A generator on a slice, see generators.py."""

    handle: int
    device: torch.device

    def held(self) -> Any:
        """The stream to the worker that has the generator. Raises RuntimeError if its lease has ended."""


_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(stand_in: Any, owner: OnSlice) -> None:
    """Let ``stand_in``, a generator of PyTorch's own, stand for ``owner``."""
    _owners[stand_in._cdata] = owner


def owner(generator: Any) -> Any:
    """The slice's generator that ``generator`` stands for, or None if it stands for none."""
    return _owners.get(generator._cdata)


def handle(generator: Any) -> int:
    """The number of a generator in the worker. Raises RuntimeError for one that is not on a slice."""
    owner = _owners.get(generator._cdata)
    if owner is None:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    owner.held()
    return owner.handle
