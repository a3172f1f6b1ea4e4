"""Collectives of ``torch.distributed`` on leased tensors: copies on the host take part in their place.

gloo exchanges host memory anyway, also of CUDA tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor

#: The operator → the positions of arguments whose elements the collective writes.
_WRITES = {
    "allreduce_": (0,),
    "allreduce_coalesced_": (0,),
    "broadcast_": (0,),
    "reduce_": (0,),
    "allgather_": (0,),
    "_allgather_base_": (0,),
    "allgather_coalesced_": (0,),
    "allgather_into_tensor_coalesced_": (0,),
    "reduce_scatter_": (0,),
    "_reduce_scatter_base_": (0,),
    "gather_": (0,),
    "scatter_": (0,),
    "alltoall_": (0,),
    "alltoall_base_": (0,),
    "send": (),
    "recv_": (0,),
    "recv_any_source_": (0,),
    "barrier": (),
}


def handler(func: Any) -> Any:
    """A handler that runs ``func`` on copies on the host, or None if it is no collective."""
    writes = _WRITES.get(func._schema.name.removeprefix("c10d::")) if func.namespace == "c10d" else None
    if writes is None:
        return None

    def on_host(dispatcher: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        here: dict[int, tuple[RemoteTensor, torch.Tensor]] = {}
        result = func(*[_copied(a, here) for a in args], **{k: _copied(v, here) for k, v in kwargs.items()})
        works = [
            v
            for v in (result if isinstance(result, tuple) else (result,))
            if isinstance(v, torch.ScriptObject)
        ]
        for work in works:
            work.wait()  # type: ignore[attr-defined]
        for n in writes:
            for t in _remote(args[n]):
                t.copy_(here[id(t)][1])
        there = {id(copy): t for t, copy in here.values()}
        return _swapped(result, there)

    return on_host


def _copied(value: Any, here: dict[int, tuple[RemoteTensor, torch.Tensor]]) -> Any:
    if type(value) is RemoteTensor:
        return here.setdefault(id(value), (value, value.detach().cpu()))[1]
    if isinstance(value, (list, tuple)):
        return [_copied(v, here) for v in value]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _remote(value: Any) -> list[RemoteTensor]:
    if type(value) is RemoteTensor:
        return [value]
    return [t for v in value for t in _remote(v)] if isinstance(value, (list, tuple)) else []


def _swapped(value: Any, there: dict[int, RemoteTensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return there.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return type(value)([_swapped(v, there) for v in value])
    return value
