"""An emulated GPU: the CPU computes, in host memory, and an operator has run when its call returns."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.sizes import host_bytes
from jupyter_gpupool.transport.specs import DeviceSpec

from .cpu_kernels import CPU_KERNELS
from .device import Device, HostCopy
from .heap import keep_freed_memory


class EmulatedDevice(Device):
    """A slice of an emulated GPU. ``ordinal`` is not used: there is only one CPU."""

    def __init__(self, spec: DeviceSpec, ordinal: int = 0) -> None:
        super().__init__(spec, torch.device("cpu"))

    @staticmethod
    def prepare_process(specs: Sequence[DeviceSpec]) -> None:
        keep_freed_memory()

    def can_become(self, spec: DeviceSpec) -> bool:
        return True

    def release_memory(self) -> None:
        pass  # the heap keeps it, as a GPU keeps its memory: the first touch of new pages takes far longer

    def upload(self, target: torch.Tensor, receive: Callable[[memoryview], None]) -> None:
        if target.is_contiguous():
            receive(host_bytes(target))
            return
        staging = torch.empty(target.shape, dtype=target.dtype)
        receive(host_bytes(staging))
        target.copy_(staging)

    def download(self, source: torch.Tensor) -> HostCopy:
        kept = source.contiguous()
        return HostCopy(kept, [kept.numel() * kept.itemsize])

    def copy_to_host(self, source: torch.Tensor, target: memoryview) -> None:
        if source.numel():
            torch.frombuffer(target, dtype=source.dtype).view(source.shape).copy_(source)

    def copy_from_host(self, target: torch.Tensor, source: memoryview) -> None:
        if target.numel():
            target.copy_(torch.frombuffer(source, dtype=target.dtype).view(target.shape))

    def in_place(self, memory: torch.Tensor) -> memoryview | None:
        return host_bytes(memory)

    def kernel(self, op: Any, default: Any) -> Any:
        own = CPU_KERNELS.get(op, default)
        if op is not None and torch.Tag.nondeterministic_seeded in op.tags:
            return functools.partial(_with_generator, self.generator, own)
        return own

    def match_threads(self, count: int) -> None:
        # With as many threads as the client has, sums get the same rounding as on the client's CPU.
        torch.set_num_threads(count)

    def is_idle(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def record_event(self) -> _Moment:
        return _Moment(time.perf_counter())

    def past_events(self, ages_s: Sequence[float]) -> list[_Moment]:
        now = time.perf_counter()
        return [_Moment(now - age_s) for age_s in ages_s]

    def ages_s(self, events: Sequence[_Moment]) -> list[float]:
        now = time.perf_counter()
        return [now - event.at for event in events]

    def properties(self) -> dict[str, int]:
        raise ValueError(f"{self.spec.name} has no properties of its own")

    def readings(self) -> dict[str, int]:
        return {"utilization": round(self.busy * 100)}


class _Moment:
    """An event of an emulated GPU. Its operators have run when the next command is read."""

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Moment) -> float:
        return (end.at - self.at) * 1e3


_default_generator = threading.Lock()


def _with_generator(generator: torch.Generator, op: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` with a slice's random state in place of the CPU's own."""
    if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
        return op(*args, **kwargs)
    default = torch.default_generator
    with _default_generator:
        default.set_state(generator.get_state())
        try:
            return op(*args, **kwargs)
        finally:
            generator.set_state(default.get_state())
