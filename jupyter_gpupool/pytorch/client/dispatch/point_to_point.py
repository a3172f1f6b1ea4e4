"""Tensors that one rank sends to another: ranks that share a worker exchange them in it.

A send leaves a copy in the worker at once. A receive waits for it in the worker, in order with the rank's operators; so
that begins only when the program waits for it: a rank may begin to receive before it sends what the other waits for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream, stream_of
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.protocol.commands import ARRIVED, POST, TAKE
from jupyter_gpupool.pytorch.torch_internals.client import work_from_future

from . import worker_collectives
from .ranks import Ranks

#: a build without torch.distributed has none
Work: Any = getattr(torch.distributed, "Work", object)

#: Sends or receives by the host; returns its work.
Host = Callable[[], Any]


#: ``work``: what a thread has begun last. PyTorch's core returns it to the program, and does not keep its Python half.
_last = threading.local()


class _Pending(Work):  # type: ignore[misc]
    """What a rank has begun with another one, and completes when it waits for it."""

    def __init__(self, tensors: Sequence[Any], source: int) -> None:
        super().__init__()
        self._tensors = list(tensors)
        self._source = source
        self._lock = threading.Lock()
        self._done = False

    def _complete(self, timeout_s: float | None) -> None:
        raise NotImplementedError

    def _is_there(self) -> bool:
        return True

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Let what follows in the program find it done. ``timeout``: None or zero for the group's."""
        with self._lock:
            if not self._done:
                self._complete(timeout.total_seconds() if timeout else None)
                self._done = True
        if getattr(_last, "work", None) is self:
            _last.work = None
        return True

    def synchronize(self) -> None:
        """As :meth:`wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether waiting takes no time."""
        return self._done or (self._is_there() and self.wait())

    def is_success(self) -> bool:
        """Whether it is done; what fails is raised where the program looks at values."""
        return self._done

    def exception(self) -> None:
        """What fails is raised where the program looks at values."""

    def get_future(self) -> Any:
        """A future of the tensors. Asking for it waits, as :meth:`wait` does."""
        self.wait()
        done: Any = torch.futures.Future()
        done.set_result(self._tensors)
        return done

    def result(self) -> list[Any]:
        """The tensors."""
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """The rank that sends."""
        return self._source

    _source_rank = source_rank


class _Sending(_Pending):
    """A copy lies in the worker. The other rank has not said yet whether it shares that one."""

    def __init__(self, ranks: Ranks, to: int, tensor: Any, by_host: Host) -> None:
        super().__init__([tensor], ranks.rank)
        self._ranks, self._to, self._by_host = ranks, to, by_host

    def _complete(self, timeout_s: float | None) -> None:
        if not self._ranks.is_near(self._to):
            self._by_host().wait()

    def _is_there(self) -> bool:
        return self._ranks.known_card(self._to) is not None


class _Receiving(_Pending):
    def __init__(self, ranks: Ranks, source: int, name: tuple[int, int], tensor: Any, by_host: Host) -> None:
        super().__init__([tensor], source)
        self._ranks, self._name, self._by_host = ranks, name, by_host

    def _address(self) -> tuple[bytes, bytes]:
        """The box of who sends, and the name of the message."""
        card = self._ranks.card(self._source)
        return card.box, card.digest(self._ranks.rank, *self._name)

    def _complete(self, timeout_s: float | None) -> None:
        ranks, tensor = self._ranks, self._tensors[0]
        if not ranks.is_near(self._source):
            self._by_host().wait()
            return
        between = [self._source, ranks.rank]
        waits_s = ranks.timeout_s if timeout_s is None else min(timeout_s, ranks.timeout_s)
        stream = stream_of(tensor._storage)
        self._done = True  # the command is queued even where an earlier one's error is raised here
        stream.push((TAKE, *self._address(), *_wire(tensor), between, waits_s))
        stream.flush()  # others may wait for what follows

    def _is_there(self) -> bool:
        if self._ranks.known_card(self._source) is None or not self._ranks.is_near(self._source):
            return False
        stream: CommandStream = stream_of(self._tensors[0]._storage)
        return bool(stream.ask((ARRIVED, *self._address())))


def send(args: Sequence[Any], by_host: Host) -> Any:
    """Run c10d's send of a leased tensor; NotImplemented where it goes by the host."""
    found = _begun(args)
    if found is None:
        return NotImplemented
    ranks, tensor, to, tag = found
    key = ("to", to, tag)
    name = ranks.own.digest(to, tag, ranks.counts[key])
    ranks.counts[key] += 1
    stream = stream_of(tensor._storage)
    stream.push((POST, ranks.own.box, name, *_wire(tensor)))
    stream.flush()  # the other one waits for it
    if ranks.known_card(to) is None:
        return _noted(args, _Sending(ranks, to, tensor, by_host))
    done: Any = torch.futures.Future()
    done.set_result([tensor])
    return work_from_future(done).boxed()


def receive(args: Sequence[Any], by_host: Host) -> Any:
    """Begin c10d's recv to a leased tensor; NotImplemented where it goes by the host."""
    found = _begun(args)
    if found is None:
        return NotImplemented
    ranks, tensor, source, tag = found
    key = ("from", source, tag)
    number = ranks.counts[key]
    ranks.counts[key] += 1
    return _noted(args, _Receiving(ranks, source, (tag, number), tensor, by_host))


def _begun(args: Sequence[Any]) -> tuple[Ranks, Any, int, int] | None:
    tensors, pg, other, tag = args
    ranks = worker_collectives.ranks_of(torch.distributed.ProcessGroup.unbox(pg), tensors[0])
    if ranks is None or (ranks.known_card(other) is not None and not ranks.is_near(other)):
        return None
    return ranks, tensors[0], other, tag


def _wire(t: RemoteTensor) -> list[Any]:
    return [t._storage.id, t._geometry.wire()]


# -- several at once: what is waited for in the end

_open: dict[int, list[Any]] = {}


class _Several(_Pending):
    def __init__(self, works: list[Any]) -> None:
        super().__init__([], -1)
        self._works = works

    def _complete(self, timeout_s: float | None) -> None:
        for work in self._works:
            work.wait()

    def _is_there(self) -> bool:
        return all(work.is_completed() for work in self._works)


def begin_several(pg: Any) -> None:
    """Collect what is begun in that process group from now on."""
    _open[id(pg)] = []


def end_several(pg: Any) -> Any:
    """One work for all that was begun since :func:`begin_several`."""
    return _Several(_open.pop(id(pg), []))


def _noted(args: Sequence[Any], work: Any) -> Any:
    _last.work = work
    found = _open.get(id(torch.distributed.ProcessGroup.unbox(args[1])))
    if found is not None:
        found.append(work)
    return work.boxed()
