"""Graphs, and programs that call them in a session on a device, as a client would."""

from __future__ import annotations

from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol import commands as codes
from jupyter_gpupool.pytorch.protocol.sizes import host_bytes
from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice
from jupyter_gpupool.pytorch.worker.executor import WorkerSession
from jupyter_gpupool.pytorch.worker.graph_steps import GraphSteps
from jupyter_gpupool.transport.specs import DeviceSpec

N = 8
VECTOR = [[N], [1], 0, "float32", 0]


def step(name: str, *args: Any, number: int, geometry: Any = VECTOR) -> list[Any]:
    return [[name, list(args), {}], ["r", number, geometry]]


def definition(*steps: Any, inputs: int = 2, returned: Any = None, **more: Any) -> dict[str, Any]:
    """A graph whose inputs are vectors on storages of their own; it returns what its last step makes."""
    last = inputs + len(steps) - 1
    return {
        "inputs": [VECTOR] * inputs,
        "held": inputs,
        "steps": list(steps),
        "returned": [[last, VECTOR, 4 * N]] if returned is None else returned,
        "inductor": False,
        **more,
    }


#: x · w, and some more
POLYNOMIAL = definition(
    step("aten::mul.Tensor", ["n", 0], ["n", 1], number=2),
    step("aten::add.Tensor", ["n", 2], ["n", 0], number=3),
    step("aten::mul.Tensor", ["n", 3], ["n", 1], number=4),
    step("aten::sin.default", ["n", 4], number=5),
    step("aten::exp.default", ["n", 5], number=6),
)

#: w += x, and w · w of it
RUNNING = definition(
    step("aten::add_.Tensor", ["n", 1], ["n", 0], number=1),
    step("aten::mul.Tensor", ["n", 2], ["n", 1], number=2),
    step("aten::neg.default", ["n", 3], number=3),
    step("aten::neg.default", ["n", 4], number=4),
)

#: x with dropout
RANDOM = definition(
    step("aten::bernoulli.p", ["n", 0], ["f", 0.5], number=2),
    step("aten::mul.Tensor", ["n", 2], ["n", 1], number=3),
    step("aten::mul.Tensor", ["n", 3], ["n", 0], number=4),
    step("aten::neg.default", ["n", 4], number=5),
)


class Program:
    """A session on a device, and the client's part of it."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.reports: list[Any] = []
        self.session = WorkerSession(
            [device], lambda header, copy: None, complain=lambda report: self.reports.append(report)
        )
        self._next = 1

    def run(self, *records: Any) -> None:
        with torch.inference_mode():
            self.session.run(list(records))

    def define(self, graph: Any, id: int = 0) -> None:
        self.run(codes.DEFINE_GRAPH, id, graph)

    def vector(self, *values: float) -> int:
        id, self._next = self._next, self._next + 1
        self.run(codes.ALLOCATE, id, 4 * N, 0)
        self.write(id, *values)
        return id

    def write(self, id: int, *values: float) -> None:
        elements = torch.tensor(values or [0.0]).repeat(N)[:N]
        self.run(codes.WRITE, id, VECTOR, bytes(host_bytes(elements)))

    def call(self, *inputs: int, id: int = 0, results: int = 1) -> Any:
        new = list(range(self._next, self._next + results))
        self._next += results
        self.run(codes.CALL_GRAPH, id, list(inputs), new)
        return new[0] if results == 1 else new

    def free(self, *ids: int) -> None:
        for id in ids:
            self.run(codes.FREE, id)

    def read(self, id: int, geometry: Any = VECTOR) -> Any:
        slot = self.session.storages[id]
        assert slot.poison is None, slot.poison
        return slot.view(self.session.geometry(geometry)).tolist()

    @property
    def graph(self) -> Any:
        return self.session.graphs._graphs[0]

    @property
    def is_recorded(self) -> bool:
        return self.session.graphs.states()[0][0] == "recorded"

    def steps(self, id: int) -> Any:
        return self.session.graphs._graphs[id].graph.steps


def plain() -> Program:
    return Program(EmulatedDevice(DeviceSpec(0, "GPU-0", "emulated", 500, 1000, True)))


def steps_of(graph: Any) -> GraphSteps:
    return GraphSteps(plain().session, graph)
