"""What programs ask of ``torch.cuda``, answered for the lease's slices; ``torch.gpupool`` answers the same."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch

from . import connection, generators, names, streams
from .device import module as gpupool
from .records import MEMORY, PROPERTIES
from .specs import DeviceSpec

#: What an emulated GPU says of itself beside its name and memory: what a V100 would.
_EMULATED = {
    "major": 7,
    "minor": 0,
    "multi_processor_count": 80,
    "warp_size": 32,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 49152,
    "L2_cache_size": 6291456,
    "is_multi_gpu_board": False,
}

#: The counters of PyTorch's caching allocator; here, where nothing is cached, memory that is reserved is in use.
_BYTES = ("allocated_bytes", "active_bytes", "requested_bytes", "reserved_bytes")
_COUNTS = ("allocation", "active", "segment")
_NEVER = ("inactive_split", "inactive_split_bytes")


class device:
    """Context manager that selects a slice; stands in for :class:`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.idx = names.slice_index(device) if device is not None else None
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = names.current_index()
        if self.idx is not None:
            names.set_current_index(self.idx)

    def __exit__(self, *error: Any) -> None:
        names.set_current_index(self.prev_idx)


class device_of(device):
    def __init__(self, obj: Any) -> None:
        super().__init__(obj.device if getattr(obj, "is_gpupool", False) else None)


def _index(device: Any) -> int:
    index = names.slice_index(device) if device is not None else None
    return names.current_index() if index is None else index


class Queries:
    """One lease's answers."""

    def __init__(self, devices: Sequence[DeviceSpec], cuda: bool) -> None:
        self._devices = devices
        self._cuda = cuda
        self._properties: dict[int, Any] = {}
        self._generators = tuple(generators.default(i) for i in range(len(devices)))

    def resize(self, devices: Sequence[DeviceSpec]) -> None:
        self._devices = devices
        self._properties.clear()

    # -- what they are

    def name(self, device: Any = None) -> str:
        return self._devices[_index(device)].name

    def properties(self, device: Any = None) -> Any:
        index = _index(device)
        found = self._properties.get(index)
        if found is None:
            spec = self._devices[index]
            facts = _EMULATED if spec.emulated else connection.stream(index).ask((PROPERTIES, index))
            found = self._properties[index] = types.SimpleNamespace(
                **{
                    **facts,
                    "name": spec.name,
                    "total_memory": spec.limit_mib << 20,
                    "uuid": spec.uuid,
                    "is_integrated": False,
                }
            )
        return found

    def capability(self, device: Any = None) -> tuple[int, int]:
        found = self.properties(device)
        return found.major, found.minor

    def architectures(self) -> list[str]:
        return ["sm_{}{}".format(*self.capability(0))]

    def has_tf32(self) -> bool:
        return self.capability()[0] >= 8

    # -- random numbers

    def states(self) -> list[torch.Tensor]:
        return [g.get_state() for g in self._generators]

    def set_states(self, states: Any) -> None:
        for generator, state in zip(self._generators, states):
            generator.set_state(state)

    def seed_one(self, seed: int) -> None:
        self._generators[names.current_index()].manual_seed(seed)

    def seed(self) -> None:
        self._generators[names.current_index()].seed()

    def seed_all(self) -> None:
        first, *others = self._generators
        seed = first.seed()
        for generator in others:
            generator.manual_seed(seed)

    # -- memory

    def memory_statistics(self, device: Any = None) -> dict[str, Any]:
        memory = connection.attached().memory(_index(device))
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
        if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        index = _index(device)
        whole = self._devices[index].limit_mib << 20
        connection.attached().memory(index).limit = int(whole * fraction)

    def fraction(self, device: Any = None) -> float:
        index = _index(device)
        return connection.attached().memory(index).limit / (self._devices[index].limit_mib << 20)

    def memory_in_use(self, device: Any = None) -> int:
        """Bytes that all processes of this lease have allocated on the slice."""
        index = _index(device)
        return connection.stream(index).ask((MEMORY, index))

    def memory_info(self, device: Any = None) -> tuple[int, int]:
        """(free, total) of the slice."""
        total = self._devices[_index(device)].limit_mib << 20
        return max(0, total - self.memory_in_use(device)), total

    # -- by the names that torch.cuda has

    def by_name(self) -> dict[str, Any]:
        cuda = self._cuda
        peak, reset = gpupool.max_memory_allocated, gpupool.reset_peak_memory_stats
        return {
            "is_available": gpupool.is_available,
            "is_initialized": lambda: True,
            "_initialized": True,
            "init": lambda: None,
            "_lazy_init": lambda: None,
            "_is_in_bad_fork": gpupool._is_in_bad_fork,
            "device_count": gpupool.device_count,
            "current_device": gpupool.current_device,
            "set_device": gpupool.set_device,
            "device": device,
            "device_of": device_of,
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
            "stream": streams.StreamContext,
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
            "set_per_process_memory_fraction": self.limit_fraction,
            "get_per_process_memory_fraction": self.fraction,
            "empty_cache": gpupool.empty_cache,
            "get_allocator_backend": lambda: "native",
        }
