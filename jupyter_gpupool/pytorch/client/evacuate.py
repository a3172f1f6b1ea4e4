"""Finds the tensors of this process that are on a slice, and moves them to the CPU."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.recurrent import OPAQUE
from jupyter_gpupool.pytorch.protocol.sizes import human
from jupyter_gpupool.pytorch.torch_internals.client import make_subclass as _make_subclass

from .dispatch import attachment
from .dispatch.copies import download
from .dispatch.sparse import SparseRemoteTensor
from .tensor.data_attribute import Hooks
from .tensor.subclasses import attributes, home_class
from .tensor.tensor import RemoteTensor, geometry, make


def live() -> list[RemoteTensor]:
    """Every tensor on the slices of this process's lease that Python still has."""
    session = attachment.current()
    if session is None or not session.connected:
        return []
    streams = session.streams()
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), RemoteTensor) and o._storage.owner in streams]
    return [
        t for t in found if t._geometry.dtype is not OPAQUE
    ]  # only a backward pass in the worker can use that


def summary(tensors: list[RemoteTensor], names: Mapping[str, Any]) -> str:
    """``3 tensors, 1.20 MiB (model, x)``. ``names`` has the variables of a notebook, by name."""
    storages = {id(t._storage): t._storage.nbytes for t in tensors}
    ours = {id(t) for t in tensors}
    called = sorted(name for name, value in names.items() if not name.startswith("_") and _holds(value, ours))
    shown = ", ".join(called[:8]) + (", …" if len(called) > 8 else "")
    count = f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}, {human(sum(storages.values()))}"
    return f"{count} ({shown})" if shown else count


def bring_home(tensors: list[RemoteTensor]) -> list[RemoteTensor]:
    """Move tensors to the CPU in place, so that variables, modules and optimizers keep them.

    Tensors that share memory still share it afterwards. Returns those that could not be moved: parts of a
    graph that still waits for its backward pass.
    """
    _bring_sparse_home()
    homes = _Homes()
    # Views first: their base cannot be swapped before.
    left = sorted(tensors, key=lambda t: not t._is_view())
    while left:
        again = _swap(left, homes)
        if len(again) == len(left):
            break
        left = again  # a tensor that was moved may have been the last to refer to another
    return left


def _bring_sparse_home() -> None:
    """Move sparse tensors whole; what is part of a graph that waits for its backward pass is left."""
    for s in [o for o in gc.get_objects() if type(o) is SparseRemoteTensor]:
        home = s.detach().cpu().requires_grad_(s.requires_grad)
        with contextlib.suppress(RuntimeError):
            torch.utils.swap_tensors(s, home)


def _swap(tensors: list[RemoteTensor], homes: _Homes) -> list[RemoteTensor]:
    """Move what can be moved now, and return the rest."""
    left: list[RemoteTensor] = []
    for t in tensors:
        home = homes.of(t)
        kept, hooks = attributes(t), Hooks(t) if t.is_leaf else None
        home = _make_subclass(home_class(t), home)
        if t.is_leaf:
            home.requires_grad_(t.requires_grad)
            if isinstance(t.grad, RemoteTensor):
                home.grad = homes.of(t.grad)
            elif type(t.grad) is SparseRemoteTensor:
                home.grad = t.grad.detach().cpu()
        try:
            torch.utils.swap_tensors(t, home)
        except RuntimeError:
            left.append(t)
            continue
        t.__dict__.update(kept)
        if hooks is not None:
            hooks.attach(t)
    return left


class _Homes:
    """Copies on the CPU that share memory where the tensors do."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def of(self, t: RemoteTensor) -> torch.Tensor:
        storage, geom = t._storage, t._geometry
        memory = self._memory.get(id(storage))
        if memory is None:
            memory = self._memory[id(storage)] = torch.empty(storage.nbytes, dtype=torch.uint8)
            if storage.nbytes:
                whole = geometry((storage.nbytes,), (1,), 0, torch.uint8, storage.index)
                download(attachment.dispatcher(storage.index), make(storage, whole), memory)
        home = torch.empty(0, dtype=geom.dtype)
        return home.set_(memory.untyped_storage(), geom.offset, geom.size, geom.stride)


def _holds(value: Any, ours: set[int]) -> bool:
    """Whether ``value`` is one of the tensors, or a module that has one."""
    if isinstance(value, torch.nn.Module):
        return any(id(p) in ours for p in value.parameters())
    return id(value) in ours
