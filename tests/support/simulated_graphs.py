"""CUDA graphs for simulated_cuda.py: what is captured is written down and not done, and a replay does it.

A replay reads and writes the memory that was there at the capture. What the program has put elsewhere meanwhile it does
not see; what a recording has allocated, replays of any graph of the pool overwrite.

As in PyTorch 2.13, two allocators note a capture, that of the GPU's memory and that of page-locked memory, and only the
first can be told from outside that a capture is over which has failed.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What captures allocate comes in pieces of so many bytes.
SEGMENT = 2 << 20
#: The bytes that a library allocates for a stream on which it is called, and never frees.
WORKSPACE = 4 << 20
#: What memory holds that nothing was computed into.
_GARBAGE = 0x55
#: What needs the device to have run everything before.
_WAITING = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class Pools:
    """The pools of graphs, and the captures that the allocator believes to be under way."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._used: set[int] = set()
        self.underway: list[int] = []
        self.underway_on_host: list[int] = []
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.stream: Any = None

    def handle(self) -> int:
        return next(self._numbers)

    def begin(self, pool: int) -> None:
        holders = [graph for graph in self.graphs if graph.pool == pool and graph.ended]
        assert holders or pool not in self._used, "a pool that was released is not used again"
        self._used.add(pool)
        self.underway.append(pool)
        if pool in self.underway_on_host:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.underway_on_host.append(pool)

    def end(self, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, pool: int) -> None:
        assert pool not in self.underway

    def nbytes(self) -> int:
        """What graphs keep; one that runs after the other uses the same memory for what it computes between."""
        total = sum(graph.nbytes for graph in self.graphs)
        return -(-total // SEGMENT) * SEGMENT


class Graph:
    """What ``torch.cuda.CUDAGraph`` is."""

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.pool = 0
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.own: dict[int, torch.Tensor] = {}
        self.ended = self.invalid = False

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.own.values())

    def replay(self) -> None:
        assert self.ended, "Called CUDAGraph::replay without a preceding successful capture."
        for other in self.pools.graphs:
            for t in other.own.values():
                _spoil(t)
        for func, args, kwargs, results in self.calls:
            got = func(*args, **kwargs)
            for recorded, value in zip(results, _tensors(got)):
                if recorded.untyped_storage()._cdata in self.own:
                    recorded.copy_(value)


@contextlib.contextmanager
def graph(gpu: Any, captured: Graph, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
    """What ``torch.cuda.graph`` is. An error leaves its stream current, and a capture that is invalid under way."""
    assert capture_error_mode == "thread_local", "other threads go on"
    torch.cuda.synchronize(None)
    torch.cuda.empty_cache()
    before, gpu.current = gpu.current, stream
    gpu.pools.begin(pool)
    captured.pool, gpu.pools.stream = pool, stream
    try:
        with _Capture(captured):
            yield
    finally:
        if captured.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        gpu.pools.end(pool)
        gpu.pools.underway_on_host.remove(pool)
        captured.ended = True
        gpu.pools.graphs.add(captured)
        gpu.current = before


class _Capture(TorchDispatchMode):
    def __init__(self, captured: Graph) -> None:
        super().__init__()
        self._captured = captured

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        captured, kwargs = self._captured, kwargs or {}
        if captured.invalid or func._schema.name in _WAITING:
            captured.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        given = _tensors((args, kwargs))
        before = [t.untyped_storage().clone() for t in given]
        random = torch.get_rng_state()
        got = func(*args, **kwargs)
        # It was only done for the layout of its results.
        torch.set_rng_state(random)
        for t, elements in zip(given, before):
            t.untyped_storage().copy_(elements)
        known = {t.untyped_storage()._cdata for t in given}
        results = _tensors(got)
        for t in results:
            if t.untyped_storage()._cdata not in known:
                captured.own.setdefault(t.untyped_storage()._cdata, t)
                _spoil(t)
        captured.calls.append((func, args, kwargs, results))
        return got


def _spoil(t: torch.Tensor) -> None:
    storage = t.untyped_storage()
    blank = torch.empty(0, dtype=torch.uint8)
    blank.set_(storage, 0, (storage.nbytes(),), (1,)).fill_(_GARBAGE)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
