"""The tensors of this process that are on a slice: what they are called, and how they come home."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from . import connection
from .memory import human
from .operators import download
from .tensor import RemoteTensor, geometry, make


def live() -> list[RemoteTensor]:
    """Every tensor of this process's lease that Python still knows."""
    session = connection.current()
    if session is None or not session.connected:
        return []
    streams = session.streams()
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is RemoteTensor and o._storage.stream in streams]


def summary(tensors: list[RemoteTensor], names: Mapping[str, Any]) -> str:
    """``3 tensors, 1.20 MiB (model, x)``; names are those of a notebook's variables."""
    storages = {id(t._storage): t._storage.nbytes for t in tensors}
    ours = {id(t) for t in tensors}
    called = sorted(name for name, value in names.items() if not name.startswith("_") and _holds(value, ours))
    shown = ", ".join(called[:8]) + (", …" if len(called) > 8 else "")
    count = f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}, {human(sum(storages.values()))}"
    return f"{count} ({shown})" if shown else count


def bring_home(tensors: list[RemoteTensor]) -> list[RemoteTensor]:
    """Move tensors to the CPU in place: every variable, module and optimizer that has one has it still.

    Tensors that share memory share it afterwards. Returns those that could not be moved: parts of a
    graph that autograd has not yet gone back through.
    """
    homes = _Homes()
    # Views first: what they are views of is in use until they are gone.
    left = sorted(tensors, key=lambda t: not t._is_view())
    while left:
        again = _swap(left, homes)
        if len(again) == len(left):
            break
        left = again  # what went home may have been all that kept another one
    return left


def _swap(tensors: list[RemoteTensor], homes: _Homes) -> list[RemoteTensor]:
    """One round of that; those that could not be moved."""
    left: list[RemoteTensor] = []
    for t in tensors:
        home = homes.of(t)
        if t.is_leaf:
            home = torch.nn.Parameter(home, t.requires_grad) if isinstance(t, torch.nn.Parameter) else home
            home.requires_grad_(t.requires_grad)
            if type(t.grad) is RemoteTensor:
                home.grad = homes.of(t.grad)
        try:
            torch.utils.swap_tensors(t, home)
        except RuntimeError:
            left.append(t)
    return left


class _Homes:
    """Copies on the CPU that share memory where the tensors do."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def of(self, t: RemoteTensor) -> torch.Tensor:
        storage, geom = t._storage, t._geometry
        memory = self._memory.get(storage.id)
        if memory is None:
            memory = self._memory[storage.id] = torch.empty(storage.nbytes, dtype=torch.uint8)
            if storage.nbytes:
                whole = geometry((storage.nbytes,), (1,), 0, torch.uint8, storage.index)
                download(connection.dispatcher(storage.index), make(storage, whole), memory)
        home = torch.empty(0, dtype=geom.dtype)
        return home.set_(memory.untyped_storage(), geom.offset, geom.size, geom.stride)


def _holds(value: Any, ours: set[int]) -> bool:
    """Whether that is one of the tensors, or a module with one."""
    if isinstance(value, torch.nn.Module):
        return any(id(p) in ours for p in value.parameters())
    return id(value) in ours
