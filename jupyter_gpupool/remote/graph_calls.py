"""The graphs that a session has been told of, and calls of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from . import records as codes
from .fusing import Fusing
from .memory import rounded
from .program import BadRecord, Geometry, Scope, nbytes_of
from .reports import report_of
from .steps import GraphSteps, StepFailed
from .storages import Poisoned, Slot

#: A client keeps fewer, see graphs.py.
MAX_GRAPHS = 10_000


class Storages(Scope, Protocol):
    """Where a graph's inputs are, and its results go."""

    def input(self, id: Any, geom: Geometry) -> torch.Tensor: ...

    def add(self, id: int, slot: Slot) -> None: ...


class Graphs:
    """Executes DEFINE_GRAPH, CALL_GRAPH and FREE_GRAPH."""

    def __init__(self, storages: Storages, complain: Callable[[dict], None]) -> None:
        self._storages = storages
        self._complain = complain
        self._graphs: dict[int, Fusing] = {}
        self.records: dict[int, Callable[..., None]] = {
            codes.DEFINE_GRAPH: self.define,
            codes.CALL_GRAPH: self.call,
            codes.FREE_GRAPH: self.free,
        }

    def define(self, id: Any, definition: Any) -> None:
        if not isinstance(id, int) or id in self._graphs or len(self._graphs) >= MAX_GRAPHS:
            raise BadRecord(f"graph number {id!r}")
        self._graphs[id] = Fusing(GraphSteps(self._storages, definition))

    def free(self, id: Any) -> None:
        self._graphs.pop(id, None)

    def call(self, id: Any, inputs: Any, new: Any) -> None:
        fusing = self._graphs.get(id) if isinstance(id, int) else None
        if fusing is None:
            raise BadRecord(f"graph {id!r} is not defined")
        graph = fusing.graph
        if len(inputs) != len(graph.inputs) or len(new) != len(graph.returned):
            raise BadRecord(f"a call of graph {id} that does not fit")
        device = graph.device
        started = time.perf_counter()
        taken = 0
        try:
            tensors = [self._storages.input(k, geom) for k, geom in zip(inputs, graph.inputs)]
            device.take(graph.peak)
            taken = graph.peak
            results = fusing.run(tensors)
            slots = [self._slot(graph, k, value) for k, value in enumerate(results)]
            device.give(taken)
            taken = 0
            for slot in slots:
                device.take(rounded(slot.nbytes))
                taken += rounded(slot.nbytes)
            for k, slot in zip(new, slots):
                self._storages.add(k, slot)
        except BadRecord:
            device.give(taken)
            raise
        except Exception as e:
            device.give(taken)
            report = e.report if isinstance(e, Poisoned) else _report(e, new)
            for k in new:
                self._storages.add(k, Slot(None, device, 0, report))
            if not isinstance(e, Poisoned):
                self._complain(report)
        finally:
            device.busy_s += time.perf_counter() - started

    def _slot(self, graph: GraphSteps, k: int, value: Any) -> Slot:
        """A result as it was predicted, on a storage of the predicted size."""
        _, geom, nbytes = graph.returned[k]
        size, stride, offset, dtype, _ = geom
        if not isinstance(value, torch.Tensor) or value.shape != size or value.dtype != dtype:
            raise RuntimeError("a graph returned something else than was predicted; please report this")
        fits = value.stride() == stride and value.storage_offset() == offset
        if not fits or value.untyped_storage().nbytes() < nbytes_of(geom):
            blank = torch.empty(nbytes, dtype=torch.uint8, device=value.device)
            laid_out = torch.empty(0, dtype=dtype, device=value.device)
            value = laid_out.set_(blank.untyped_storage(), offset, size, stride).copy_(value)
        slot = Slot(value, graph.device, nbytes)
        slot.views[geom] = value
        return slot


def _report(e: Exception, new: Sequence[int]) -> dict[str, Any]:
    report = report_of(e.name, e.reason) if isinstance(e, StepFailed) else report_of(None, e)
    if new:
        report["made"] = new[0]
    return report
