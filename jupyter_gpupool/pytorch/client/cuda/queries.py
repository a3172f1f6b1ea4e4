"""The queries of ``torch.cuda`` and ``torch.gpupool``, answered for the slices of the lease."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.device import generators, streams
from jupyter_gpupool.pytorch.client.device.properties import EMULATED, DeviceProperties
from jupyter_gpupool.pytorch.client.device.registration import module as gpupool
from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.protocol.commands import MEMORY, PROPERTIES, READINGS
from jupyter_gpupool.pytorch.torch_internals.client import CUDA_ANSWERS
from jupyter_gpupool.transport.specs import DeviceSpec

from . import software
from .memory_history import MemoryHistory

#: The counters of PyTorch's caching allocator. Nothing is cached here, so reserved memory is memory in use.
_BYTES = ("allocated_bytes", "active_bytes", "requested_bytes", "reserved_bytes")
_COUNTS = ("allocation", "active", "segment")
_NEVER = ("inactive_split", "inactive_split_bytes")


#: The functions of torch.cuda that read a sensor: percent, percent, °C, mW, MHz.
SENSORS = ("utilization", "memory_usage", "temperature", "power_draw", "clock_rate")


class device:
    """Context manager that selects a slice; replaces :class:`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.idx = device_names.slice_index(device) if device is not None else None
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = device_names.current_index()
        if self.idx is not None:
            device_names.set_current_index(self.idx)

    def __exit__(self, *error: Any) -> None:
        device_names.set_current_index(self.prev_idx)


class device_of(device):
    """Context manager that selects the slice of a tensor; replaces :class:`torch.cuda.device_of`."""

    def __init__(self, obj: Any) -> None:
        super().__init__(obj.device if getattr(obj, "is_gpupool", False) else None)


def exchange_device(device: int) -> int:
    """Select the slice of a number, or none if it is negative, and return the number of the one before."""
    before = device_names.current_index()
    if device >= 0:
        device_names.set_current_index(device)
    return before


def _index(device: Any) -> int:
    device_names.refresh()
    index = device_names.slice_index(device) if device is not None else None
    return device_names.checked(device_names.current_index()) if index is None else index


class Queries:
    """Answers for one lease, under the names that ``torch.cuda`` has (:meth:`by_name`). Memory is in bytes."""

    def __init__(self, devices: Sequence[DeviceSpec], cuda: bool) -> None:
        self._devices = devices
        self._cuda = cuda
        self._properties: dict[int, DeviceProperties] = {}
        self._history = MemoryHistory()
        self._generators = tuple(generators.default(i) for i in range(len(devices)))

    def resize(self, devices: Sequence[DeviceSpec]) -> None:
        """Take over the slices' new limits."""
        self._devices = devices
        self._properties.clear()

    # -- what they are

    def name(self, device: Any = None) -> str:
        """The model of the GPU."""
        return self._devices[_index(device)].name

    def properties(self, device: Any = None) -> DeviceProperties:
        """What ``torch.cuda.get_device_properties`` returns; the total memory is that of the slice."""
        index = _index(device)
        found = self._properties.get(index)
        if found is None:
            spec = self._devices[index]
            numbers = EMULATED if spec.emulated else attachment.stream(index).ask((PROPERTIES, index))
            found = self._properties[index] = DeviceProperties(spec, numbers)
        return found

    def capability(self, device: Any = None) -> tuple[int, int]:
        """The compute capability: (major, minor)."""
        found = self.properties(device)
        return found.major, found.minor

    def architectures(self) -> list[str]:
        """The architectures that the GPU server's PyTorch has code for, such as ``sm_70``; at least the first GPU's."""
        return list(software.of_server().architectures) or ["sm_{}{}".format(*self.capability(0))]

    def has_tf32(self) -> bool:
        """Whether the GPU has TF32."""
        return self.capability()[0] >= 8

    # -- what they do now

    def reading(self, name: str, device: Any = None) -> int:
        """What a sensor of the GPU reports now, in PyTorch's unit. Raises RuntimeError if there is no such sensor."""
        index = _index(device)
        readings = attachment.stream(index).ask((READINGS, index))
        if name not in readings:
            raise RuntimeError(f"torch.cuda.{name}: {self._devices[index].name} does not report it")
        return int(readings[name])

    def processes(self, device: Any = None) -> str:
        """This process and its memory on the slice, in the form of ``torch.cuda.list_gpu_processes``."""
        index = _index(device)
        used_mb = attachment.attached().memory(index).allocated() / (1 << 20)
        running = f"process {os.getpid():>10d} uses {used_mb:>12.3f} MB GPU memory"
        return f"GPU:{index}\n{running if used_mb else 'no processes are running'}"

    # -- random numbers

    def states(self) -> list[torch.Tensor]:
        """The random state of each slice, one-dimensional uint8 tensors on the CPU."""
        return [g.get_state() for g in self._generators]

    def set_states(self, states: Any) -> None:
        """Set the random state of each slice to what :meth:`states` returned."""
        for generator, state in zip(self._generators, states):
            generator.set_state(state)

    def seed_one(self, seed: int) -> None:
        """Seed the current slice."""
        self._generators[device_names.current_index()].manual_seed(seed)

    def seed(self) -> None:
        """Seed the current slice with a random number."""
        self._generators[device_names.current_index()].seed()

    def seed_all(self) -> None:
        """Seed every slice with the same random number."""
        first, *others = self._generators
        seed = first.seed()
        for generator in others:
            generator.manual_seed(seed)

    # -- memory

    def memory_statistics(self, device: Any = None) -> dict[str, Any]:
        """What ``torch.cuda.memory_stats_as_nested_dict`` returns: the counters of CUDA's caching allocator."""
        memory = attachment.attached().memory(_index(device))
        current, peak, freed = memory.allocated(), memory.peak, memory.freed_total
        count = memory.count

        def pools(current: int, peak: int, allocated: int, freed: int) -> dict[str, Any]:
            every = {"current": current, "peak": peak, "allocated": allocated, "freed": freed}
            return {"all": every, "large_pool": every, "small_pool": dict.fromkeys(every, 0)}

        found: dict[str, Any] = {
            name: pools(current, peak, current + freed - memory.base_bytes, freed) for name in _BYTES
        }
        ever = count + memory.freed_count - memory.base_count
        found.update({name: pools(count, memory.peak_count, ever, memory.freed_count) for name in _COUNTS})
        found.update({name: pools(0, 0, 0, 0) for name in _NEVER})
        for name in ("oversize_allocations", "oversize_segments"):
            found[name] = {"current": 0, "peak": 0, "allocated": 0, "freed": 0}
        found.update(num_alloc_retries=0, num_ooms=memory.refused, max_split_size=-1)
        return found

    def limit_fraction(self, fraction: float, device: Any = None) -> None:
        """Limit this process to a fraction (0 to 1) of the slice's memory. Raises ValueError for another number."""
        if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        attachment.attached().memory(_index(device)).limit_to(fraction)

    def fraction(self, device: Any = None) -> float:
        """The fraction of the slice's memory that this process is limited to."""
        return attachment.attached().memory(_index(device)).fraction

    def memory_in_use(self, device: Any = None) -> int:
        """Bytes that all processes of the lease have allocated on the slice."""
        index = _index(device)
        return attachment.stream(index).ask((MEMORY, index))

    def memory_info(self, device: Any = None) -> tuple[int, int]:
        """Bytes of the slice: (free, total)."""
        total = self._devices[_index(device)].limit_mib << 20
        return max(0, total - self.memory_in_use(device)), total

    # -- by the names that torch.cuda has

    def by_name(self) -> dict[str, Any]:
        """Each function, by the name that ``torch.cuda`` has for it."""
        cuda = self._cuda
        peak, reset = gpupool.max_memory_allocated, gpupool.reset_peak_memory_stats
        return {
            "is_available": gpupool.is_available,
            "is_initialized": gpupool.is_initialized,
            CUDA_ANSWERS["initialized"]: True,
            "init": lambda: None,
            CUDA_ANSWERS["lazy_init"]: lambda: None,
            CUDA_ANSWERS["is_in_bad_fork"]: gpupool._is_in_bad_fork,
            "device_count": gpupool.device_count,
            "current_device": gpupool.current_device,
            "set_device": gpupool.set_device,
            "device": device,
            "device_of": device_of,
            CUDA_ANSWERS["exchange_device"]: exchange_device,
            CUDA_ANSWERS["maybe_exchange_device"]: exchange_device,
            "synchronize": gpupool.synchronize,
            "get_device_name": self.name,
            "get_device_properties": self.properties,
            "get_device_capability": self.capability,
            "get_arch_list": self.architectures,
            "is_bf16_supported": lambda including_emulation=True: (
                including_emulation or self.capability()[0] >= 8
            ),
            "is_tf32_supported": self.has_tf32,
            "can_device_access_peer": lambda device, peer_device: _index(device) != _index(peer_device),
            "is_localization_supported": lambda *args, **kwargs: False,
            "get_num_locality_domains": lambda *args, **kwargs: 1,
            "ipc_collect": lambda: None,
            # random numbers
            "default_generators": self._generators,
            "manual_seed": self.seed_one,
            "manual_seed_all": gpupool.manual_seed_all,
            "seed": self.seed,
            "seed_all": self.seed_all,
            "initial_seed": gpupool.initial_seed,
            "get_rng_state": gpupool.get_rng_state,
            "set_rng_state": gpupool.set_rng_state,
            "get_rng_state_all": self.states,
            "set_rng_state_all": self.set_states,
            # streams
            "Stream": streams.CudaStream if cuda else streams.Stream,
            "Event": streams.CudaEvent if cuda else streams.Event,
            "StreamContext": streams.StreamContext,
            "stream": lambda stream: streams.StreamContext(stream),
            "current_stream": lambda device=None: streams.current_stream(device, cuda),
            "default_stream": lambda device=None: streams.default_stream(device, cuda),
            "set_stream": streams.set_stream,
            "is_current_stream_capturing": lambda: False,
            # memory
            "memory_allocated": gpupool.memory_allocated,
            "max_memory_allocated": peak,
            "memory_reserved": gpupool.memory_allocated,
            "max_memory_reserved": peak,
            "memory_cached": gpupool.memory_allocated,
            "max_memory_cached": peak,
            "reset_peak_memory_stats": reset,
            "reset_max_memory_allocated": reset,
            "reset_max_memory_cached": reset,
            "reset_accumulated_memory_stats": gpupool.reset_accumulated_memory_stats,
            "memory_stats_as_nested_dict": self.memory_statistics,
            "mem_get_info": self.memory_info,
            "device_memory_used": self.memory_in_use,
            **{name: functools.partial(self.reading, name) for name in SENSORS},
            "list_gpu_processes": self.processes,
            "memory_snapshot": self._history.segments,
            CUDA_ANSWERS["record_memory_history"]: self._history.record,
            CUDA_ANSWERS["snapshot"]: self._history.snapshot,
            "set_per_process_memory_fraction": self.limit_fraction,
            "get_per_process_memory_fraction": self.fraction,
            "empty_cache": gpupool.empty_cache,
            "get_allocator_backend": lambda: "native",
        }
