"""A stand-in for PyTorch's CUDA on one GPU: its allocator counts, its streams are written down, the CPU computes.

What it does is what PyTorch and CUDA document: ``set_per_process_memory_fraction`` caps what is reserved, NVML's use of
a process is the context and what is reserved, and a stream runs in order. A graph is captured without computing, and
replayed on the memory that was there at the capture, see simulated_graphs.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from jupyter_gpupool.pytorch.worker import cuda_device, cuda_graphs
from jupyter_gpupool.transport.specs import DeviceSpec

from .simulated_graphs import WORKSPACE, Graph, Pools, graph

MIB = 1 << 20


class Stream:
    def __init__(self, gpu: SimulatedGpu, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.working = False
        self.workspace = 0
        self.cuda_stream = id(self)

    def query(self) -> bool:
        return not self.working

    def wait_stream(self, other: Stream) -> None:
        self.gpu.log.append(f"{self.name} waits for {other.name}")


class Event:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu

    def record(self, stream: Stream) -> None:
        self.at = self.gpu.seconds

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.log.append("host waits for a copy")

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class SimulatedGpu:
    """A card of ``total_mib``, of which this process' context takes ``context_mib``."""

    def __init__(self, total_mib: int = 1000, context_mib: int = 100, workspace_mib: int = 8) -> None:
        self.total_mib, self.context_mib, self.workspace_mib = total_mib, context_mib, workspace_mib
        self.reserved_mib = 0
        self.allocated_mib = 0
        self.fraction = 1.0
        self.emptied = 0
        self.seconds = 0.0
        self.log: list[str] = []
        self.compute, self.copies = Stream(self, "compute"), Stream(self, "copies")
        self.current = self.compute
        self._streams = iter([self.copies])
        self.pools = Pools()
        #: by the driver's numbers of processes
        self.processes: dict[int, int] = {}
        self.own_pid = 4242
        self.utilization: list[tuple[int, int, int]] = []
        self.sticky: Exception | None = None

    @property
    def cap_mib(self) -> int:
        """What the allocator may reserve."""
        return int(self.fraction * self.total_mib)

    def warm_up(self) -> None:
        self.allocated_mib = self.reserved_mib = self.workspace_mib
        self.processes[self.own_pid] = self.context_mib

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def synchronize(device: Any) -> None:
            if self.sticky is not None:
                raise self.sticky

        def empty_cache() -> None:
            assert not self.pools.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"
            self.emptied += 1
            self.reserved_mib = self.allocated_mib

        @contextlib.contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, self.current = self.current, chosen
            if chosen.name == "aside":
                chosen.workspace = WORKSPACE
            try:
                yield
            finally:
                self.current = before

        def snapshot() -> list[dict[str, Any]]:
            aside = self.pools.stream
            if aside is None:
                return []
            of_stream = {"device": None, "stream": aside.cuda_stream}
            return [{"total_size": size, **of_stream} for size in (self.pools.nbytes(), aside.workspace)]

        def processes(handle: Any) -> list[Any]:
            return [
                SimpleNamespace(
                    pid=pid, usedGpuMemory=(mib + (self.reserved_mib if pid == self.own_pid else 0)) * MIB
                )
                for pid, mib in self.processes.items()
            ]

        def used(handle: Any) -> Any:
            return SimpleNamespace(used=sum(p.usedGpuMemory for p in processes(handle)))

        def utilization(handle: Any, since: int) -> list[Any]:
            found = [
                SimpleNamespace(pid=pid, timeStamp=at, smUtil=share)
                for pid, at, share in self.utilization
                if at > since
            ]
            if not found:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
            return found

        for name, function in {
            "Stream": lambda device: next(self._streams, None) or Stream(self, "aside"),
            "set_stream": lambda chosen: setattr(self, "current", chosen),
            "device": lambda device: contextlib.nullcontext(),
            "CUDAGraph": lambda: Graph(self.pools),
            "graph": lambda *args, **kwargs: graph(self, *args, **kwargs),
            "graph_pool_handle": self.pools.handle,
            "memory_snapshot": snapshot,
            "Event": lambda enable_timing=False: Event(self),
            "current_stream": lambda device=None: self.current,
            "stream": stream,
            "synchronize": synchronize,
            "empty_cache": empty_cache,
            "memory_reserved": lambda device: self.reserved_mib * MIB,
            "memory_allocated": lambda device: self.allocated_mib * MIB,
            "mem_get_info": lambda device: (0, self.total_mib * MIB),
            "set_per_process_memory_fraction": lambda share, device: setattr(self, "fraction", share),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(cuda_graphs, "end_allocate_to_pool", lambda device, pool: self.pools.end(pool))
        monkeypatch.setattr(cuda_graphs, "release_pool", lambda device, pool: self.pools.release(pool))
        monkeypatch.setattr(cuda_graphs, "MIN_RELEASE", (0, 0))  # it is not this PyTorch that captures
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "default_generators", (torch.default_generator,))
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", used)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", processes)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetProcessUtilization", utilization)
        monkeypatch.setattr(cuda_device, "_pinned", lambda n: torch.empty(n, dtype=torch.uint8))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: self.log.append(f"kept for {s.name}"))

    def device(self, limit_mib: int) -> cuda_device.CudaDevice:
        """A slice of this GPU."""
        gpu = self

        class OnTheCpu(cuda_device.CudaDevice):
            @staticmethod
            def _torch_device(ordinal: int) -> torch.device:
                return torch.device("cpu")

            def _warm_up(self) -> None:
                gpu.warm_up()

            def _push(self, target: torch.Tensor, source: torch.Tensor) -> Any:
                gpu.log.append("copy")
                return super()._push(target, source)

        return OnTheCpu(DeviceSpec(0, "GPU-simulated", "a GPU", limit_mib, self.total_mib, False), 0)
