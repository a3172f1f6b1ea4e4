"""Random generators, events and properties of the GPUs, as a session's commands use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol import commands as codes

from .device import Device, Event
from .templates import BadRecord

#: The most of a session at once: each takes memory of the worker.
MAX_GENERATORS = 1_000
MAX_EVENTS = 100_000


class Handles:
    """The generators and events of one session, by the ids that its client gave them."""

    def __init__(self, device: Callable[[Any], Device]) -> None:
        self._device = device
        self._generators: dict[int, tuple[Device, torch.Generator]] = {}
        self._events: dict[int, tuple[Device, Event]] = {}

    def free(self, id: Any) -> None:
        """Drop the generator or event ``id``, if there is one."""
        self._generators.pop(id, None)
        self._events.pop(id, None)

    def generator(self, number: Any) -> torch.Generator:
        """A generator by its id, or by -1 - device index the default one of a slice. Raises BadRecord."""
        if isinstance(number, int) and number < 0:
            return self._device(-1 - number).generator
        try:
            return self._generators[number][1]
        except (KeyError, TypeError):
            raise BadRecord(f"there is no generator {number!r}") from None

    def _event(self, id: Any) -> Event:
        try:
            return self._events[id][1]
        except (KeyError, TypeError):
            raise BadRecord(f"there is no event {id!r}") from None

    def _room(self, table: dict[Any, Any], id: Any, most: int, what: str) -> None:
        if not isinstance(id, int) or id < 1:
            raise BadRecord(f"a handle numbered {id!r}")
        if len(table) >= most:
            raise RuntimeError(
                f"a session may have only {most} {what} at once; drop those that are not needed any more"
            )

    # -- their state, see lease_state.py

    def named(self) -> tuple[dict[int, tuple[Device, torch.Generator]], dict[int, tuple[Device, Event]]]:
        """The generators and the events by their ids, each with its device."""
        return self._generators, self._events

    def put_generator(self, id: int, device: Device, state: torch.Tensor) -> None:
        """Enter a generator in that state. Raises BadRecord."""
        self._room(self._generators, id, MAX_GENERATORS, "generators")
        generator = torch.Generator(device.torch_device)
        generator.set_state(state)
        self._generators[id] = device, generator

    def put_events(self, device: Device, ages_s: dict[int, float]) -> None:
        """Enter events of a device that were recorded so many seconds ago, by their ids. Raises BadRecord."""
        for id, event in zip(ages_s, device.past_events(list(ages_s.values()))):
            self._room(self._events, id, MAX_EVENTS, "events")
            self._events[id] = device, event

    # -- commands, see protocol/commands.py

    def seed_generator(self, number: Any, index: Any, seed: Any) -> None:
        """Execute GENERATOR: seed a generator, and create it if its id is new."""
        device = self._device(index)
        if not isinstance(seed, int):
            raise BadRecord(f"a seed of {seed!r}")
        if isinstance(number, int) and number >= 0 and number not in self._generators:
            self._room(self._generators, number, MAX_GENERATORS, "generators")
            self._generators[number] = device, torch.Generator(device.torch_device)
        self.generator(number).manual_seed(seed)

    def get_rng_state(self, number: Any) -> tuple[dict[str, Any], None]:
        """Answer GET_RNG."""
        generator = self.generator(number)
        return {"state": generator.get_state().numpy().tobytes(), "seed": generator.initial_seed()}, None

    def set_rng_state(self, number: Any, state: Any) -> None:
        """Execute SET_RNG."""
        if not isinstance(state, bytes):
            raise BadRecord(f"a random state of {state!r}")
        self.generator(number).set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def record_event(self, id: Any, index: Any) -> None:
        """Execute EVENT."""
        device = self._device(index)
        if not isinstance(id, int) or id not in self._events:
            self._room(self._events, id, MAX_EVENTS, "events")
        self._events[id] = device, device.record_event()

    def done(self, which: Any) -> tuple[bool, None]:
        """Answer DONE: whether everything before an event, or on a device, has run."""
        if isinstance(which, int) and which < 0:
            return self._device(-1 - which).is_idle(), None
        return self._event(which).query(), None

    def await_event(self, id: Any) -> tuple[None, None]:
        """Answer AWAIT once everything before the event has run."""
        self._event(id).synchronize()
        return None, None

    def elapsed(self, start: Any, end: Any) -> tuple[float, None]:
        """Answer ELAPSED: the milliseconds between two events."""
        first, second = self._event(start), self._event(end)
        try:
            return first.elapsed_time(second), None
        except (TypeError, AttributeError):
            raise BadRecord("a time between two different kinds of GPU") from None

    def memory(self, index: Any) -> tuple[int, None]:
        """Answer MEMORY: the bytes that all processes of the lease use on a device."""
        return self._device(index).used(), None

    def properties(self, index: Any) -> tuple[dict[str, int], None]:
        """Answer PROPERTIES. Raises ValueError for an emulated GPU, which has none."""
        return self._device(index).properties(), None

    def readings(self, index: Any) -> tuple[dict[str, int], None]:
        """Answer READINGS. What a GPU does not report is left out; an emulated one reports how busy it is."""
        return self._device(index).readings(), None


#: Commands that have an answer: code → method.
ANSWERS: dict[int, Callable[..., Any]] = {
    codes.GET_RNG: Handles.get_rng_state,
    codes.DONE: Handles.done,
    codes.AWAIT: Handles.await_event,
    codes.ELAPSED: Handles.elapsed,
    codes.MEMORY: Handles.memory,
    codes.PROPERTIES: Handles.properties,
    codes.READINGS: Handles.readings,
}
#: Commands without an answer: code → method.
ACTS: dict[int, Callable[..., Any]] = {
    codes.GENERATOR: Handles.seed_generator,
    codes.SET_RNG: Handles.set_rng_state,
    codes.EVENT: Handles.record_event,
}
