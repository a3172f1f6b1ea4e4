"""``torch.save``, ``torch.load``, ``pickle`` and ``copy``: the same files and copies as of a CUDA device."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.subclasses import attributes, home_class, make_of_class
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import (
    UNINITIALIZED,
    rebuild_from_type,
    rebuild_parameter,
    rebuild_parameter_with_state,
    rebuild_tensor,
)

from . import storages


def reduce(t: RemoteTensor) -> tuple[Any, ...]:
    """Pickle a remote tensor as any tensor: its class on the CPU, and its storage tagged with the device."""
    home, state = home_class(t), attributes(t)
    if home is torch.nn.Parameter:
        parts: tuple[Any, ...] = (t.data, t.requires_grad, OrderedDict())
        if state:
            return rebuild_parameter_with_state, (*parts, state)
        return rebuild_parameter, parts
    storage = torch.storage.TypedStorage(wrap_storage=storages.storage_of(t), dtype=t.dtype, _internal=True)
    geom = t._geometry
    torch.utils.hooks.warn_if_has_hooks(t)
    args: tuple[Any, ...] = (
        storage,
        geom.offset,
        tuple(geom.size),
        tuple(geom.stride),
        t.requires_grad,
        OrderedDict(),
    )
    if home is torch.Tensor and not state:
        return rebuild_tensor, args
    return rebuild_from_type, (rebuild_tensor, home, args, state)


def _reduce_ex(t: RemoteTensor, protocol: Any) -> tuple[Any, ...]:
    return reduce(t)


def deepcopy(t: RemoteTensor, memo: dict[Any, Any]) -> torch.Tensor:
    """``copy.deepcopy(t)``: of a parameter its elements alone, of another tensor everything.

    Tensors that share memory share it in the copy, too.
    """
    if id(t) in memo:
        found: torch.Tensor = memo[id(t)]
        return found
    if isinstance(t, torch.nn.Parameter):
        made = type(t)(t.data.clone(memory_format=torch.preserve_format), t.requires_grad)
        memo[id(t)] = made
        return made
    if not t.is_leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
            "protocol at the moment."
        )
    storage = copy.deepcopy(storages.storage_of(t), memo)
    made = make_of_class(home_class(t), storage.remote, t._geometry)
    made.requires_grad_(t.requires_grad)
    if t.grad is not None:
        made.grad = copy.deepcopy(t.grad, memo)
    for name, value in attributes(t).items():
        setattr(made, name, copy.deepcopy(value, memo))
    memo[id(t)] = made
    return made


def _tag(storage: Any) -> str | None:
    """The device that a file names: ``cuda:1`` wherever that means the slice, for other processes read it too."""
    if not isinstance(storage, storages.RemoteStorage):
        return None
    index = storage.remote.index
    return f"cuda:{index}" if device_names.cuda_is_ours else f"{device_names.BACKEND}:{index}"


def _restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """A loaded storage on a slice if the tag ``location`` names one, else None; ``torch.load`` calls this."""
    if location == "cpu" or not device_names.count:
        return None
    try:
        device = torch.device(location)
    except RuntimeError:
        return None
    if device_names.slice_index(device) is None:
        return None
    if isinstance(storage, storages.RemoteStorage) and storage.device == device:
        return storage
    made = storages.new(storage.nbytes(), device)
    # Files of the older format are read into the storage afterwards.
    return made if getattr(storage, UNINITIALIZED, False) else made.copy_(storage)


def register() -> None:
    """Let ``torch.save``, ``torch.load`` and ``copy`` handle remote tensors."""
    RemoteTensor.__reduce_ex__ = _reduce_ex  # type: ignore[assignment, method-assign]
    RemoteTensor.__deepcopy__ = deepcopy  # type: ignore[assignment, method-assign]
    # Before PyTorch's own packages: theirs for `cuda` needs CUDA.
    torch.serialization.register_package(5, _tag, _restore)  # type: ignore[arg-type]
