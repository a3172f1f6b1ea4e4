"""Collectives of ``torch.distributed`` on leased tensors: in the worker, or copies on the host take part for them.

gloo exchanges host memory anyway, also of CUDA tensors.
"""

from __future__ import annotations

import threading
from typing import Any, NoReturn

import torch

from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import work_from_future

from . import point_to_point, worker_collectives
from .ranks import start_native

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
    "reduce_scatter_tensor_coalesced_": (0,),
    "gather_": (0,),
    "scatter_": (0,),
    "alltoall_": (0,),
    "alltoall_base_": (0,),
    "barrier": (),
}
#: What two ranks do. gloo's work for these may be waited for only once, and programs do so themselves.
_BETWEEN_TWO = frozenset({"send", "recv_"})


def handler(func: Any) -> Any:
    """A handler that runs ``func`` on copies on the host, or None if it is no collective."""
    if func.namespace != "c10d":
        return None
    name = func._schema.name.removeprefix("c10d::")
    if name in _BETWEEN_TWO:
        in_worker = point_to_point.send if name == "send" else point_to_point.receive

        def exchange(dispatcher: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = in_worker(args, lambda: _between_two(func, args))
            if found is NotImplemented:
                return point_to_point.noted(args, _between_two(func, args)()).boxed()
            return found

        return exchange
    if name == "recv_any_source_":
        return _refuse_any_source
    writes = _WRITES.get(name)
    if writes is None:
        return None

    def run(dispatcher: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = worker_collectives.run(name, args)
        return on_host(args, kwargs) if found is NotImplemented else found

    def on_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    return run


def _refuse_any_source(*_: Any) -> NoReturn:
    raise NotImplementedError("a leased tensor is received from a rank that is named: give it as src")


def _between_two(func: Any, args: tuple[Any, ...]) -> point_to_point.Host:
    """What begins to send what the tensors are now, or to receive, without a question to the worker.

    It returns at once: a rank may begin to receive before it sends what the other one waits for.
    """
    here: dict[int, tuple[RemoteTensor, torch.Tensor]] = {}
    receives = func._schema.name == "c10d::recv_"
    if receives:  # all of it will be written
        here.update((id(t), (t, torch.empty_like(t.detach(), device="cpu"))) for t in args[0])
    copied = [_copied(a, here) for a in args]

    def begin() -> Any:
        work = func(*copied)
        done: Any = torch.futures.Future()

        def finish() -> None:
            try:
                work.wait()
                if receives:
                    for t, copy in here.values():
                        with torch.inference_mode(t.is_inference()), torch.no_grad():
                            t.copy_(copy)
                done.set_result([t for t, _ in here.values()])
            except Exception as e:
                done.set_exception(e)

        start_native(threading.Thread(target=finish, name="gpupool-p2p", daemon=True))
        return work_from_future(done)

    return begin


def _copied(value: Any, here: dict[int, tuple[RemoteTensor, torch.Tensor]]) -> Any:
    if type(value) is RemoteTensor:
        if id(value) not in here:
            here[id(value)] = value, value.detach().cpu()
        return here[id(value)][1]
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
