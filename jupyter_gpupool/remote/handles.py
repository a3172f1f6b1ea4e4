"""What a session asks of its worker beside operators: random generators, moments in time (events), facts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from . import records as codes
from .program import BadRecord
from .slices import Device

#: No program needs more of them at once, and each takes memory of the worker's.
MAX_GENERATORS = 1_000
MAX_EVENTS = 100_000


_PROPERTIES = (
    "major",
    "minor",
    "multi_processor_count",
    "warp_size",
    "max_threads_per_multi_processor",
    "regs_per_multiprocessor",
    "shared_memory_per_block",
    "shared_memory_per_block_optin",
    "shared_memory_per_multiprocessor",
    "L2_cache_size",
    "is_multi_gpu_board",
)


class _Moment:
    """An event of an emulated GPU, whose operators are done when the next record is looked at."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Moment) -> float:
        return (end.at - self.at) * 1e3


class Handles:
    """The generators and events of one session, by the ids that its client gave them."""

    def __init__(self, device: Callable[[Any], Device]) -> None:
        self._device = device
        self._generators: dict[int, torch.Generator] = {}
        self._events: dict[int, Any] = {}

    def free(self, id: Any) -> None:
        self._generators.pop(id, None)
        self._events.pop(id, None)

    def generator(self, number: Any) -> torch.Generator:
        if isinstance(number, int) and number < 0:
            return self._device(-1 - number).generator
        try:
            return self._generators[number]
        except (KeyError, TypeError):
            raise BadRecord(f"generator {number!r} is not known") from None

    def _event(self, id: Any) -> Any:
        try:
            return self._events[id]
        except (KeyError, TypeError):
            raise BadRecord(f"event {id!r} is not known") from None

    def _room(self, table: dict, id: Any, most: int, what: str) -> None:
        if not isinstance(id, int) or id < 1:
            raise BadRecord(f"a handle numbered {id!r}")
        if len(table) >= most:
            raise RuntimeError(f"more than {most} {what} at once; drop those that are not needed any more")

    # -- records, see records.py

    def seed_generator(self, number: Any, index: Any, seed: Any) -> None:
        device = self._device(index)
        if not isinstance(seed, int):
            raise BadRecord(f"a seed of {seed!r}")
        if isinstance(number, int) and number >= 0 and number not in self._generators:
            self._room(self._generators, number, MAX_GENERATORS, "generators")
            self._generators[number] = torch.Generator(device.torch_device)
        self.generator(number).manual_seed(seed)

    def get_rng_state(self, number: Any) -> tuple[dict[str, Any], None]:
        generator = self.generator(number)
        return {"state": generator.get_state().numpy().tobytes(), "seed": generator.initial_seed()}, None

    def set_rng_state(self, number: Any, state: Any) -> None:
        if not isinstance(state, bytes):
            raise BadRecord(f"a random state of {state!r}")
        self.generator(number).set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def record_event(self, id: Any, index: Any) -> None:
        device = self._device(index)
        if not isinstance(id, int) or id not in self._events:
            self._room(self._events, id, MAX_EVENTS, "events")
        if device.spec.emulated:
            self._events[id] = _Moment()
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device.torch_device))
        self._events[id] = event

    def done(self, which: Any) -> tuple[bool, None]:
        if isinstance(which, int) and which < 0:
            device = self._device(-1 - which)
            return device.spec.emulated or torch.cuda.current_stream(device.torch_device).query(), None
        return self._event(which).query(), None

    def await_event(self, id: Any) -> tuple[None, None]:
        self._event(id).synchronize()
        return None, None

    def elapsed(self, start: Any, end: Any) -> tuple[float, None]:
        first, second = self._event(start), self._event(end)
        if type(first) is not type(second):
            raise BadRecord("a time between two different kinds of GPU")
        return first.elapsed_time(second), None

    def memory(self, index: Any) -> tuple[int, None]:
        return self._device(index).allocated, None

    def properties(self, index: Any) -> tuple[dict[str, int], None]:
        device = self._device(index)
        if device.spec.emulated:
            raise ValueError(f"{device.spec.name} has no properties of its own")
        found = torch.cuda.get_device_properties(device.torch_device)
        facts = ((name, getattr(found, name, None)) for name in _PROPERTIES)
        return {name: fact for name, fact in facts if isinstance(fact, int)}, None


#: What answers, and what does not.
ANSWERS: dict[int, Callable] = {
    codes.GET_RNG: Handles.get_rng_state,
    codes.DONE: Handles.done,
    codes.AWAIT: Handles.await_event,
    codes.ELAPSED: Handles.elapsed,
    codes.MEMORY: Handles.memory,
    codes.PROPERTIES: Handles.properties,
}
ACTS: dict[int, Callable] = {
    codes.GENERATOR: Handles.seed_generator,
    codes.SET_RNG: Handles.set_rng_state,
    codes.EVENT: Handles.record_event,
}
