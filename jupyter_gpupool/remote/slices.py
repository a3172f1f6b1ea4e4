"""A worker's slices: where they compute, what they have allocated, and their random state."""

from __future__ import annotations

import threading
from typing import Any

import torch

from .memory import out_of_memory
from .specs import DeviceSpec

#: PyTorch's own default seed (torch.default_generator's before anybody seeds it).
DEFAULT_SEED = 67280421310721


class Device:
    """One slice: where it computes, how much it has allocated for all sessions, its random state. ``ordinal``: its
    number among those of this worker."""

    def __init__(self, spec: DeviceSpec, ordinal: int) -> None:
        self.spec = spec
        self.torch_device = torch.device("cpu") if spec.emulated else torch.device("cuda", ordinal)
        self.limit = spec.limit_mib << 20
        self.allocated = 0
        self.busy_s = 0.0
        self.lock = threading.Lock()
        self.generator = torch.Generator(self.torch_device).manual_seed(DEFAULT_SEED)

    def cap(self) -> None:
        """Let CUDA itself know the limit; an emulated GPU has nobody to tell."""
        if not self.spec.emulated:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(
                self.spec.limit_mib / self.spec.total_mib, self.torch_device
            )

    def resize(self, spec: DeviceSpec) -> None:
        """The slice is smaller or larger from here on; the caller holds the lock, and what is on it fits."""
        self.spec = spec
        self.limit = spec.limit_mib << 20
        self.cap()

    def take(self, nbytes: int) -> None:
        with self.lock:
            if self.allocated + nbytes > self.limit:
                message = out_of_memory(self.spec.index, nbytes, self.allocated, self.limit)
                raise torch.OutOfMemoryError(message)
            self.allocated += nbytes

    def give(self, nbytes: int) -> None:
        with self.lock:
            self.allocated -= nbytes


def with_generator(device: Device, op: Any, args: list, kwargs: dict) -> Any:
    """Emulated GPUs share one CPU, whose random state stands in for the slice's while an operator draws."""
    if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
        return op(*args, **kwargs)
    default = torch.default_generator
    with _default_generator:
        default.set_state(device.generator.get_state())
        try:
            return op(*args, **kwargs)
        finally:
            device.generator.set_state(default.get_state())


_default_generator = threading.Lock()
