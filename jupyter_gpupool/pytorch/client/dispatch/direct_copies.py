"""Copies between the workers of a lease on several GPU servers: from worker to worker, where they are linked."""

from __future__ import annotations

import logging
import secrets
import threading
import weakref
from dataclasses import dataclass

from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.protocol.commands import LINK, MEET

from .worker_collectives import DEFAULT_TIMEOUT_S

log = logging.getLogger(__name__)


@dataclass
class _Pair:
    """Two workers, each a rank of a group; ``id``: empty where they are not linked."""

    id: bytes
    ranks: tuple[CommandStream, CommandStream]
    reports: int
    count: int = 0


#: both halves of a copy are queued at once, so that two workers never wait for each other's later ones
_lock = threading.Lock()
_pairs: weakref.WeakKeyDictionary[CommandStream, weakref.WeakKeyDictionary[CommandStream, _Pair]] = (
    weakref.WeakKeyDictionary()
)


def are_linked(one: CommandStream, two: CommandStream) -> bool:
    """Whether two workers are linked. The first question links them; it waits until they have done what is queued."""
    with _lock:
        return bool(_pair(one, two).id)


def copy(source: RemoteTensor, here: CommandStream, destination: RemoteTensor, there: CommandStream) -> bool:
    """Queue a copy between two workers; False where they are not linked.

    ``source`` and ``destination``: of one type, and of as many elements, which are copied in their order.
    """
    with _lock:
        pair = _pair(here, there)
        if not pair.id:
            return False
        size, call = len(pair.ranks), ["copy", "", pair.ranks.index(here)]
        for rank, stream in enumerate(pair.ranks):
            tensors = [
                [t._storage.id, t._geometry.wire()] for t in (source if stream is here else destination,)
            ]
            inputs, outputs = (tensors, []) if stream is here else ([], tensors)
            stream.append((MEET, [pair.id, size, rank, pair.count], call, inputs, outputs, DEFAULT_TIMEOUT_S))
        pair.count += 1
    for stream in pair.ranks:
        stream.flush()  # the other worker waits for it
    return True


def _pair(one: CommandStream, two: CommandStream) -> _Pair:
    first, second = sorted((one, two), key=_name)
    known = _pairs.setdefault(first, weakref.WeakKeyDictionary()).get(second)
    reports = first.reports + second.reports
    # What failed may have been the link.
    if known is None or (known.id and known.reports != reports):
        known = _pairs[first][second] = _linked(first, second, reports)
    return known


def _name(stream: CommandStream) -> str:
    """The name by which other workers of the lease know that worker; empty where none is linked to it."""
    return str(stream.connection.welcome.get("peer") or "")


def _linked(first: CommandStream, second: CommandStream, reports: int) -> _Pair:
    id, ranks = secrets.token_bytes(16), (first, second)
    names = [_name(stream) for stream in ranks]
    if not all(names):
        return _Pair(b"", ranks, reports)
    for rank, stream in enumerate(ranks):  # the first one connects
        if why := stream.ask((LINK, id, names, rank)):
            log.warning("Copies between two GPU servers pass this process: %s", why)
            return _Pair(b"", ranks, reports)
    return _Pair(id, ranks, reports)
