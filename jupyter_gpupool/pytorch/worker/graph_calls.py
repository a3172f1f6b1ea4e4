"""The graphs that a session has defined, and calls of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from jupyter_gpupool.pytorch.protocol import commands as codes
from jupyter_gpupool.pytorch.protocol.sizes import rounded

from .device import Device
from .error_reports import report_of
from .graph_fusion import FusedGraph
from .graph_replay import ReplayedGraph
from .graph_steps import GraphSteps, StepFailed
from .storages import Poisoned, Slot
from .templates import BadRecord, Geometry, Scope, nbytes_of

#: The most graphs of a session; a client keeps fewer, see compile/graphs.py.
MAX_GRAPHS = 10_000


class Storages(Scope, Protocol):
    """Where a graph's inputs come from and its results go."""

    #: the client's numbers of the devices
    number: dict[Device, int]

    def input(self, id: Any, geom: Geometry) -> torch.Tensor:
        """The tensor of that layout on storage ``id``."""

    def add(self, id: int, slot: Slot) -> None:
        """Enter a new storage."""

    def add_all(self, ids: Sequence[int], slots: Sequence[Slot]) -> None:
        """Enter new storages, all of them or none."""

    def note_writes(self, ids: Iterable[int]) -> None:
        """Storages are written to, so that copies of their memory are out of date."""


class Graphs:
    """Executes DEFINE_GRAPH, CALL_GRAPH and FREE_GRAPH."""

    def __init__(self, storages: Storages, complain: Callable[[dict[str, Any], BaseException], None]) -> None:
        self._storages = storages
        self._complain = complain
        self._graphs: dict[int, ReplayedGraph] = {}
        self.records: dict[int, Callable[..., None]] = {
            codes.DEFINE_GRAPH: self.define,
            codes.CALL_GRAPH: self.call,
            codes.FREE_GRAPH: self.free,
        }

    def define(self, id: Any, definition: Any) -> None:
        """Execute DEFINE_GRAPH. Raises BadRecord."""
        if not isinstance(id, int) or id in self._graphs or len(self._graphs) >= MAX_GRAPHS:
            raise BadRecord(f"graph number {id!r}")
        graph = GraphSteps(self._storages, definition)
        self._graphs[id] = ReplayedGraph(FusedGraph(graph), graph.device.recordings)

    def defined(self) -> Iterable[tuple[int, FusedGraph]]:
        """The graphs by their numbers."""
        return ((id, graph.fused) for id, graph in self._graphs.items())

    def define_again(self, id: int, definition: Any, calls_left: int, compiled: bool) -> None:
        """Define a graph as another session had it. Raises BadRecord."""
        self.define(id, definition)
        self._graphs[id].fused.resume(calls_left, compiled)

    def states(self) -> tuple[list[str], None]:
        """Answer GRAPHS."""
        return [graph.state for graph in self._graphs.values()], None

    def free(self, id: Any) -> None:
        """Execute FREE_GRAPH."""
        graph = self._graphs.pop(id, None)
        if graph is not None:
            graph.forget()

    def close(self) -> None:
        """Free what the graphs keep: the session has ended."""
        with contextlib.ExitStack() as stack:  # each of them, also where one fails
            for graph in self._graphs.values():
                stack.callback(graph.forget)

    def call(self, id: Any, inputs: Any, new: Any) -> None:
        """Execute CALL_GRAPH. Raises BadRecord; errors of operators are reported to the client."""
        replayed = self._graphs.get(id) if isinstance(id, int) else None
        if replayed is None:
            raise BadRecord(f"graph {id!r} is not defined")
        graph = replayed.graph
        if len(inputs) != len(graph.inputs) or len(new) != len(graph.returned):
            raise BadRecord(f"a call of graph {id} with too few or too many storages")
        device = graph.device
        started = time.perf_counter()
        taken = 0
        try:
            tensors = [self._storages.input(k, geom) for k, geom in zip(inputs, graph.inputs)]
            if graph.writes:
                self._storages.note_writes(inputs)
            device.take(graph.peak)
            taken = graph.peak
            try:
                results = replayed.run(tensors)
            except (torch.OutOfMemoryError, StepFailed) as e:
                reason = e.reason if isinstance(e, StepFailed) else e
                if not isinstance(reason, torch.OutOfMemoryError):
                    raise
                results = device.call_again(reason, replayed.run if graph.is_repeatable else None, tensors)
            slots = [self._slot(graph, k, value) for k, value in enumerate(results)]
            device.give(taken)
            taken = 0
            for slot in slots:
                device.take(rounded(slot.nbytes))
                taken += rounded(slot.nbytes)
            self._storages.add_all(new, slots)
        except BadRecord:
            device.give(taken)
            raise
        except Exception as e:
            device.give(taken)
            report = e.report if isinstance(e, Poisoned) else _report(e, new, self._storages.number)
            for k in new:
                self._storages.add(k, Slot(None, device, 0, report))
            if not isinstance(e, Poisoned):
                self._complain(report, e.reason if isinstance(e, StepFailed) else e)
        finally:
            device.busy_s += time.perf_counter() - started

    def _slot(self, graph: GraphSteps, k: int, value: Any) -> Slot:
        """A result as it was predicted, on a storage of the predicted size."""
        _, geom, nbytes = graph.returned[k]
        size, stride, offset, dtype, _ = geom
        if not isinstance(value, torch.Tensor) or value.shape != size or value.dtype != dtype:
            raise RuntimeError("the result of a compiled graph is not what was predicted; please report this")
        fits = value.stride() == stride and value.storage_offset() == offset
        if not fits or value.untyped_storage().nbytes() < nbytes_of(geom):
            blank = torch.empty(nbytes, dtype=torch.uint8, device=value.device)
            laid_out = torch.empty(0, dtype=dtype, device=value.device)
            value = laid_out.set_(blank.untyped_storage(), offset, size, stride).copy_(value)
        slot = Slot(value, graph.device, nbytes)
        slot.views[geom] = value
        return slot


def _report(e: Exception, new: Sequence[int], number: dict[Device, int]) -> dict[str, Any]:
    name, reason = (e.name, e.reason) if isinstance(e, StepFailed) else (None, e)
    report = report_of(name, reason, number)
    if new:
        report["made"] = new[0]
    return report
