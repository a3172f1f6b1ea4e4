"""``torch.multiprocessing``: a tensor that is sent to another process of the lease shares its memory with it.

All processes of a lease use the same worker. The sender gives the storage a random name there, and the name, with the
tensor's layout, is what the queue or pipe carries. The other process opens the name, and both have the same memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import weakref
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.dispatch.resizing import received
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.command_stream import ids, stream_of
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor, Storage, dtype_name, geometry, make
from jupyter_gpupool.pytorch.protocol.commands import OPEN_STORAGE, SEND_STORAGE

_NAME_BYTES = 16

#: The storages that this process has sent or received, and the numbers and names of their memory: what comes back is
#: the same memory. A storage that was resized since has another number.
_names: weakref.WeakKeyDictionary[Storage, tuple[int, bytes]] = weakref.WeakKeyDictionary()
_storages: weakref.WeakValueDictionary[bytes, Storage] = weakref.WeakValueDictionary()
_waits_at_exit = False


def reduce(t: RemoteTensor) -> tuple[Any, ...]:
    """Send ``t`` to another process; what ``multiprocessing`` pickles instead of it.

    Raises RuntimeError, as PyTorch does, for a tensor that other tensors are differentiated through.
    """
    if t.requires_grad and not t.is_leaf:
        raise RuntimeError(
            "Cowardly refusing to serialize non-leaf tensor which requires_grad, since autograd does not support "
            "crossing process boundaries. If you just want to transfer the data, call detach() on the tensor before "
            "serializing (e.g., putting it on the queue)."
        )
    spec = attachment.attached().spec
    storage, geom = t._storage, t._geometry
    name = _name(storage) or os.urandom(_NAME_BYTES)
    stream_of(storage).ask((SEND_STORAGE, storage.id, name))
    _remember(storage, name)
    uuid = next(device.uuid for device in spec.devices if device.index == geom.index)
    layout = (tuple(geom.size), tuple(geom.stride), geom.offset, dtype_name(geom.dtype), geom.cuda)
    return rebuild, (spec.lease_id, uuid, name, layout, t.requires_grad, isinstance(t, torch.nn.Parameter))


def rebuild(
    lease_id: str, uuid: str, name: bytes, layout: tuple[Any, ...], requires_grad: bool, is_parameter: bool
) -> torch.Tensor:
    """Receive what :func:`reduce` has sent. Raises RuntimeError where this process has not the sender's lease."""
    session = attachment.attached()
    if session.spec.lease_id != lease_id:
        raise RuntimeError(
            f"this tensor is on a GPU of lease {lease_id}, but this process has lease {session.spec.lease_id}; "
            "send a copy on the CPU (.cpu())"
        )
    index = next((device.index for device in session.spec.devices if device.uuid == uuid), None)
    if index is None:
        raise RuntimeError(
            f"this tensor is on GPU {uuid}, which CUDA_VISIBLE_DEVICES hides from this process; "
            "send a copy on the CPU (.cpu()), or do not hide the GPU"
        )
    size, stride, offset, dtype, cuda = layout
    storage = _open(name, index)
    t: torch.Tensor = make(
        storage,
        geometry(size, stride, offset, getattr(torch, dtype), index, cuda and device_names.cuda_is_ours),
    )
    return torch.nn.Parameter(t, requires_grad) if is_parameter else t.requires_grad_(requires_grad)


def _open(name: bytes, index: int) -> Storage:
    stream = attachment.stream(index)
    id = next(ids)
    nbytes = stream.ask((OPEN_STORAGE, name, id))["nbytes"]
    opened = stream.known_storage(id, nbytes, index)
    storage = _storages.get(name)
    if storage is None or storage.owner is not stream or _name(storage) != name:
        storage = opened
        received.add(storage)
    _remember(storage, name)
    return storage


def _name(storage: Storage) -> bytes | None:
    """The name of the memory that ``storage`` has now."""
    id, name = _names.get(storage, (None, None))
    return name if storage.nbytes and id == storage.id else None


def _remember(storage: Storage, name: bytes) -> None:
    global _waits_at_exit
    _names[storage], _storages[name] = (storage.id, name), storage
    if not _waits_at_exit:
        _waits_at_exit = True
        # Other processes read what this one computes last; a child of multiprocessing ends without more ado.
        multiprocessing.util.Finalize(None, _finish, exitpriority=0)


def _finish() -> None:
    session = attachment.current()
    if session is not None and session.connected:
        for stream in session.streams():
            with contextlib.suppress(RuntimeError):  # the lease has ended
                stream.wait()


def register() -> None:
    """Let ``multiprocessing`` send remote tensors."""
    ForkingPickler.register(RemoteTensor, reduce)
