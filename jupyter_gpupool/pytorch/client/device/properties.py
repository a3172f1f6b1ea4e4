"""What ``torch.cuda.get_device_properties`` returns for a slice."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from jupyter_gpupool.pytorch.protocol.device_properties import NUMBERS
from jupyter_gpupool.transport.specs import DeviceSpec

#: Those of an emulated GPU: a V100 with 32 GB on PCIe, clocks in kHz. It is on no bus.
EMULATED = {
    "major": 7,
    "minor": 0,
    "multi_processor_count": 80,
    "warp_size": 32,
    "max_threads_per_block": 1024,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 98304,
    "shared_memory_per_multiprocessor": 98304,
    "L2_cache_size": 6291456,
    "clock_rate": 1380000,
    "memory_clock_rate": 877000,
    "memory_bus_width": 4096,
    "is_integrated": 0,
    "is_multi_gpu_board": 0,
    "pci_bus_id": 0,
    "pci_device_id": 0,
    "pci_domain_id": 0,
}


class DeviceUuid(str):
    """The GPU's uuid without the ``GPU-`` that NVML puts before it, as PyTorch prints it."""

    @property
    def bytes(self) -> bytes:
        """The 16 bytes of the uuid."""
        return uuid.UUID(self).bytes


class DeviceProperties:
    """The properties of a slice under PyTorch's names of them; the total memory, in bytes, is the slice's own."""

    name: str
    gcnArchName: str
    total_memory: int
    uuid: DeviceUuid

    def __init__(self, spec: DeviceSpec, numbers: Mapping[str, Any]) -> None:
        found = {name: numbers[name] for name in NUMBERS if isinstance(numbers.get(name), int)}
        vars(self).update(
            # CUDA has no name for an architecture of AMD's; PyTorch answers with the GPU's name.
            {**found, "name": spec.name, "gcnArchName": spec.name, "total_memory": spec.limit_mib << 20},
            uuid=DeviceUuid(spec.uuid.removeprefix("GPU-")),
        )

    def __getattr__(self, name: str) -> Any:
        if name in NUMBERS:
            raise AttributeError(f"the GPU server's PyTorch does not report {name!r} of {self.name}")
        raise AttributeError(f"the properties of a GPU have no attribute {name!r}")

    def __repr__(self) -> str:
        known = vars(self)
        shown = [f"name='{self.name}'", *(f"{name}={known.get(name)}" for name in ("major", "minor"))]
        shown += [f"total_memory={self.total_memory >> 20}MB"]
        shown += [f"multi_processor_count={known.get('multi_processor_count')}", f"uuid={self.uuid}"]
        shown += [f"{name}={known.get(name)}" for name in ("pci_bus_id", "pci_device_id", "pci_domain_id")]
        shown += [f"L2_cache_size={known.get('L2_cache_size', 0) >> 20}MB"]
        return f"_CudaDeviceProperties({', '.join(shown)})"
