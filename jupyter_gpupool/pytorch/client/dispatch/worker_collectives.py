"""Collectives of ``torch.distributed`` in place of NCCL: ranks that share a worker exchange their tensors in it.

Ranks on several workers of a lease exchange them from worker to worker. Where these cannot be linked, and of other
leases, they exchange them through the host, see host_collectives.py.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream, stream_of
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.protocol.commands import JOIN, LINK, MEET
from jupyter_gpupool.pytorch.torch_internals.client import work_from_future

from . import ranks as ranks_
from .ranks import Card, Ranks

log = logging.getLogger(__name__)

#: The longest time that a rank waits for others where the program has not chosen one, as NCCL's, in seconds.
DEFAULT_TIMEOUT_S = 600.0


@dataclass
class Group:
    """A process group whose ranks' leased tensors are exchanged. ``id``: empty where that is done by the host."""

    id: bytes
    size: int
    rank: int
    timeout_s: float
    count: int = 0


#: the process groups in whose place this stands, with their timeouts in seconds; all others leave tensors to the host
_asked: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
_known: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()

#: why ranks exchange tensors through this process, where that has been logged
_said: set[str] = set()

#: what ranks know of each other, by process group
_ranks: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()


def begin_world(pg: Any, timeout_s: float) -> None:
    """Exchange leased tensors of the process group of all ranks in the worker."""
    ranks_.begin_world()
    stand_in(pg, timeout_s)


def stand_in(pg: Any, timeout_s: float) -> None:
    """Exchange leased tensors of that process group in the worker."""
    _asked[pg] = timeout_s


def stands_in(pg: Any) -> bool:
    """Whether leased tensors of that process group are exchanged in the worker."""
    return pg in _asked


def set_timeout(pg: Any, timeout_s: float) -> None:
    """Let ranks wait so long for each other from now on, where leased tensors are exchanged in the worker."""
    if pg in _asked:
        _asked[pg] = timeout_s
        for known in (_known.get(pg), _ranks.get(pg)):
            if known is not None:
                known.timeout_s = timeout_s


def run(name: str, args: Sequence[Any]) -> Any:
    """Run a collective of c10d in the worker; NotImplemented where it has to go through the host."""
    plan = _PLANS.get(_ONE_BY_ONE.get(name, name))
    pg = _process_group(args)
    if plan is None or pg is None or pg not in _asked:
        return NotImplemented
    if name in _ONE_BY_ONE:
        return _one_by_one(_ONE_BY_ONE[name], *args)
    group = _known.get(pg)
    example = _first(args)
    ranks = ranks_of(pg, example)
    assert ranks is not None, "this stands in for it"
    if group is None:
        group = _known[pg] = _agreed(ranks, stream_of(example._storage))
    if not group.id:
        return NotImplemented
    outputs, call, inputs, results = plan(group, *args)
    stream = stream_of(example._storage)
    record = (
        MEET,
        [group.id, group.size, group.rank, group.count],
        call,
        [_wire(t) for t in inputs],
        [_wire(t) for t in outputs],
        group.timeout_s,
    )
    group.count += 1
    stream.push(record)
    stream.flush()  # others wait for it
    work = _done(outputs)
    return work if results is None else (results, work)


def _one_by_one(name: str, outputs: Sequence[Any], inputs: Sequence[Any], *options: Any) -> Any:
    """Run the collective for each output and its input; NotImplemented where they have to go through the host."""
    for output, input in zip(outputs, inputs, strict=True):
        if run(name, (output, input, *options)) is NotImplemented:
            return NotImplemented
    return _done(outputs)


def _done(outputs: Sequence[Any]) -> Any:
    """c10d's Work of a collective that the worker orders by itself."""
    done: Any = torch.futures.Future()
    done.set_result(list(outputs))
    return work_from_future(done).boxed()


def _process_group(args: Sequence[Any]) -> Any:
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return torch.distributed.ProcessGroup.unbox(value)
    return None


def ranks_of(pg: Any, example: RemoteTensor) -> Ranks | None:
    """What a rank knows of the others, and they of it; None for a process group whose tensors go by the host.

    Raises RuntimeError if the tensor is on another worker than those before it.
    """
    index = example._geometry.index
    ranks = _ranks.get(pg)
    if ranks is not None:
        ranks.check(index)
    elif pg in _asked:
        ranks = _ranks[pg] = Ranks(pg, _asked[pg], index)
        linked = stream_of(example._storage).ask((JOIN, ranks.own.box))
        ranks.publish(linked or ())  # who knows of this rank may send to it, and leave
    return ranks


def _agreed(ranks: Ranks, stream: CommandStream) -> Group:
    """What all ranks of a group find out together, at its first collective."""
    cards = ranks.cards(range(ranks.size))
    together = all(card.place == ranks.own.place for card in cards)
    id = hashlib.sha256("".join(card.nonce for card in cards).encode()).digest()[:16]
    if not together and (why := _objection(ranks, cards, id, stream)):
        if why not in _said:
            log.warning("Ranks on several GPU servers exchange tensors through this process: %s", why)
            _said.add(why)
        id = b""
    return Group(id, ranks.size, ranks.rank, ranks.timeout_s)


def _objection(ranks: Ranks, cards: Sequence[Card], id: bytes, stream: CommandStream) -> str:
    """Why the group's workers cannot be linked, the same for all ranks; empty if they are."""
    leases = {card.place.partition(" ")[0] for card in cards}
    if len(leases) > 1:
        return "they are of several leases"
    peers = [card.peer for card in cards]
    if not all(peers):
        return "a GPU server of the lease links no workers"
    return next(filter(None, ranks.gather("linked", stream.ask((LINK, id, peers, ranks.rank)))), "")


def _first(value: Any) -> Any:
    if type(value) is RemoteTensor:
        return value
    if isinstance(value, (list, tuple)):
        return next((t for v in value if (t := _first(v)) is not None), None)
    return None


def _wire(t: RemoteTensor) -> list[Any]:
    return [t._storage.id, t._geometry.wire()]


# -- what each operator of c10d is: (outputs, (kind, operation, root), inputs, what it returns beside its work)

_Plan = tuple[Sequence[Any], tuple[str, str, int], Sequence[Any], Any]
_NAMES = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")


def _operation(op: Any) -> str:
    number = op.op()
    if number >= len(_NAMES):
        raise NotImplementedError("slices have no ReduceOp.PREMUL_SUM: multiply before you reduce, with SUM")
    return _NAMES[number]


def _parts(t: Any, sizes: Sequence[int] | int) -> list[Any]:
    """A contiguous tensor in parts along its first dimension: so many of equal length, or of these lengths."""
    if not isinstance(sizes, int):
        return list(t.split(list(sizes), 0))
    if t.numel() % sizes:
        raise ValueError(
            f"a tensor of {t.numel()} elements cannot be exchanged by {sizes} ranks in equal parts"
        )
    return list(t.view(-1).chunk(sizes)) if t.numel() else [t] * sizes


def _all_reduce(g: Group, tensors: Any, pg: Any, op: Any, *_: Any) -> _Plan:
    return tensors, ("all_reduce", _operation(op), -1), tensors, tensors


def _all_reduce_coalesced(g: Group, tensors: Any, pg: Any, op: Any, *_: Any) -> _Plan:
    return tensors, ("all_reduce", _operation(op), -1), tensors, None


def _reduce(g: Group, tensors: Any, pg: Any, op: Any, root: int, *_: Any) -> _Plan:
    return tensors if g.rank == root else (), ("all_reduce", _operation(op), root), tensors, None


def _broadcast(g: Group, tensors: Any, pg: Any, root: int, *_: Any) -> _Plan:
    return tensors, ("broadcast", "", root), tensors if g.rank == root else (), tensors


def _all_gather(g: Group, outputs: Any, inputs: Any, *_: Any) -> _Plan:
    return outputs[0], ("gather", "", -1), inputs, outputs


def _all_gather_base(g: Group, output: Any, input: Any, *_: Any) -> _Plan:
    return _parts(output, g.size), ("gather", "", -1), [input], output


def _reduce_scatter(g: Group, outputs: Any, inputs: Any, pg: Any, op: Any, *_: Any) -> _Plan:
    return outputs, ("reduce_scatter", _operation(op), -1), inputs[0], outputs


def _reduce_scatter_base(g: Group, output: Any, input: Any, pg: Any, op: Any, *_: Any) -> _Plan:
    return [output], ("reduce_scatter", _operation(op), -1), _parts(input, g.size), output


def _gather(g: Group, outputs: Any, inputs: Any, pg: Any, root: int, *_: Any) -> _Plan:
    return outputs[0] if g.rank == root else (), ("gather", "", root), inputs, None


def _scatter(g: Group, outputs: Any, inputs: Any, pg: Any, root: int, *_: Any) -> _Plan:
    return outputs, ("scatter", "", root), inputs[0] if g.rank == root else (), outputs


def _all_to_all(g: Group, outputs: Any, inputs: Any, *_: Any) -> _Plan:
    return outputs, ("all_to_all", "", -1), inputs, outputs


def _all_to_all_base(g: Group, output: Any, input: Any, pg: Any, to: Any, of: Any, *_: Any) -> _Plan:
    return _parts(output, to or g.size), ("all_to_all", "", -1), _parts(input, of or g.size), None


_PLANS: dict[str, Callable[..., _Plan]] = {
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce_coalesced,
    "reduce_": _reduce,
    "broadcast_": _broadcast,
    "allgather_": _all_gather,
    "_allgather_base_": _all_gather_base,
    "reduce_scatter_": _reduce_scatter,
    "_reduce_scatter_base_": _reduce_scatter_base,
    "gather_": _gather,
    "scatter_": _scatter,
    "alltoall_": _all_to_all,
    "alltoall_base_": _all_to_all_base,
}
#: What does the same for several tensors → what does it for one.
_ONE_BY_ONE = {
    "allgather_into_tensor_coalesced_": "_allgather_base_",
    "reduce_scatter_tensor_coalesced_": "_reduce_scatter_base_",
}
