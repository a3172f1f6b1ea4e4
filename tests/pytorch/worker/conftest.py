"""A simulated GPU for the tests of what the worker does on real ones."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the data plane needs PyTorch")

from ...support.graph_programs import Program
from ...support.simulated_cuda import SimulatedGpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    simulated.install(monkeypatch)
    return simulated


@pytest.fixture
def program(gpu: SimulatedGpu) -> Program:
    return Program(gpu.device(500))
