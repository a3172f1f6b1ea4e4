"""Tensors that one rank sends to another: ranks that share a worker exchange them in it.

Ranks at workers that are linked do so, too: a tensor waits at the sender's worker, and the receiver's fetches it.

A send leaves a copy in the worker at once. A receive waits for it in the worker, in order with the rank's operators; so
that begins only when the program waits for it: a rank may begin to receive before it sends what the other waits for.

Whether two ranks share a worker, or have linked ones, is known when both have begun to exchange. What was begun before
goes by the host from then on if they do not, in the order in which it was begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream, stream_of
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.protocol.commands import ARRIVED, FETCH, IS_THERE, POST, TAKE, WITHDRAW
from jupyter_gpupool.pytorch.torch_internals.client import work_from_future

from . import worker_collectives
from .ranks import Ranks

#: a build without torch.distributed has none
Work: Any = getattr(torch.distributed, "Work", object)

#: Sends or receives by the host, and asks the worker nothing; returns its work.
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


class _BetweenTwo(_Pending):
    """``by_host``: begins the same by the host. Any thread may call it while the worker makes this rank wait."""

    def __init__(self, ranks: Ranks, other: int, tensor: Any, source: int, by_host: Host) -> None:
        super().__init__([tensor], source)
        self._ranks, self._other = ranks, other
        self._by_host: Host | None = by_host
        self._host: Any = None
        self._failure: Exception | None = None
        ranks.when_known(other, self._decide)

    def _decide(self) -> None:
        """The other one's card is known: begin by the host if it is far. Called once."""
        by_host, self._by_host = self._by_host, None  # it may have a copy of the tensor
        try:
            if by_host is not None and not _is_direct(self._ranks, self._other):
                self._leave_worker()
                self._host = by_host()
        except Exception as e:
            self._failure = e

    def _leave_worker(self) -> None:
        """It goes by the host."""

    def _in_worker(self, timeout_s: float | None) -> None:
        """Complete it in the worker."""

    def _complete(self, timeout_s: float | None) -> None:
        self._ranks.card(self._other)
        if self._failure is not None:
            raise self._failure
        if self._host is not None:
            self._host.wait()
        else:
            self._in_worker(timeout_s)

    def _has_arrived(self) -> bool:
        """Whether it takes no time to complete it in the worker."""
        return True

    def _is_there(self) -> bool:
        if self._ranks.known_card(self._other) is None:
            return False
        self._ranks.settle(self._other)
        if self._failure is not None:
            return True
        return bool(self._host.is_completed()) if self._host is not None else self._has_arrived()


class _Sending(_BetweenTwo):
    """A copy lies in the worker."""

    def __init__(self, ranks: Ranks, to: int, name: bytes, tensor: Any, by_host: Host) -> None:
        self._name = name
        super().__init__(ranks, to, tensor, ranks.rank, by_host)

    def _leave_worker(self) -> None:
        stream_of(self._tensors[0]._storage).append((WITHDRAW, self._ranks.own.box, self._name))


class _Receiving(_BetweenTwo):
    def __init__(self, ranks: Ranks, source: int, name: tuple[int, int], tensor: Any, by_host: Host) -> None:
        self._name = name
        super().__init__(ranks, source, tensor, source, by_host)

    def _address(self) -> tuple[bytes, bytes]:
        """The box of who sends, and the name of the message."""
        card = self._ranks.card(self._source)
        return card.box, card.digest(self._ranks.rank, *self._name)

    def _in_worker(self, timeout_s: float | None) -> None:
        ranks, tensor = self._ranks, self._tensors[0]
        between = [self._source, ranks.rank]
        waits_s = ranks.timeout_s if timeout_s is None else min(timeout_s, ranks.timeout_s)
        stream = stream_of(tensor._storage)
        self._done = True  # the command is queued even where an earlier one's error is raised here
        where = (TAKE,) if ranks.is_near(self._source) else (FETCH, ranks.card(self._source).peer)
        stream.push((*where, *self._address(), *_wire(tensor), between, waits_s))
        stream.flush()  # others may wait for what follows

    def _has_arrived(self) -> bool:
        stream: CommandStream = stream_of(self._tensors[0]._storage)
        is_near = self._ranks.is_near(self._source)
        where = (ARRIVED,) if is_near else (IS_THERE, self._ranks.card(self._source).peer)
        return bool(stream.ask((*where, *self._address())))


def send(args: Sequence[Any], by_host: Callable[[], Host]) -> Any:
    """Run c10d's send of a leased tensor; NotImplemented where it goes by the host.

    While it is not known which way it goes, it asks for ``by_host``, which copies the tensor to the host: when it is
    known, the worker may make this rank wait for what the other one has to send before.
    """
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
    if ranks.known_card(to) is None or not _is_direct(ranks, to):
        return noted(args, _Sending(ranks, to, name, tensor, by_host())).boxed()
    done: Any = torch.futures.Future()
    done.set_result([tensor])
    return work_from_future(done).boxed()


def receive(args: Sequence[Any], by_host: Callable[[], Host]) -> Any:
    """Begin c10d's recv to a leased tensor; NotImplemented where it goes by the host."""
    found = _begun(args)
    if found is None:
        return NotImplemented
    ranks, tensor, source, tag = found
    key = ("from", source, tag)
    number = ranks.counts[key]
    ranks.counts[key] += 1
    begins = _Receiving(ranks, source, (tag, number), tensor, lambda: by_host()())
    return noted(args, begins).boxed()


def _begun(args: Sequence[Any]) -> tuple[Ranks, Any, int, int] | None:
    tensors, pg, other, tag = args
    ranks = worker_collectives.ranks_of(torch.distributed.ProcessGroup.unbox(pg), tensors[0])
    if ranks is None:
        return None
    if ranks.known_card(other) is not None:
        ranks.settle(other)
        if not _is_direct(ranks, other):
            return None
    return ranks, tensors[0], other, tag


def _is_direct(ranks: Ranks, other: int) -> bool:
    return ranks.is_near(other) or ranks.is_linked(other)


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


def noted(args: Sequence[Any], work: Any) -> Any:
    """The work of a send or receive with these arguments, which belongs to what was begun together."""
    if isinstance(work, _Pending):
        _last.work = work
    found = _open.get(id(torch.distributed.ProcessGroup.unbox(args[1])))
    if found is not None:
        found.append(work)
    return work
