"""The properties of a GPU that a worker sends and a client shows."""

from __future__ import annotations

#: The numbers and texts that the class in PyTorch has beside name, total_memory, uuid and gcnArchName.
NUMBERS = (
    "major",
    "minor",
    "multi_processor_count",
    "warp_size",
    "max_threads_per_block",
    "max_threads_per_multi_processor",
    "regs_per_multiprocessor",
    "shared_memory_per_block",
    "shared_memory_per_block_optin",
    "shared_memory_per_multiprocessor",
    "L2_cache_size",
    "clock_rate",
    "memory_clock_rate",
    "memory_bus_width",
    "is_integrated",
    "is_multi_gpu_board",
    "pci_bus_id",
    "pci_device_id",
    "pci_domain_id",
)
