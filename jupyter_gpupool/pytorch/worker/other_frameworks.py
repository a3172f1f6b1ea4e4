"""Sessions of other frameworks than PyTorch, which a worker serves on the same slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .device import Device, HostCopy
from .held_arrays import Array, HeldArray
from .residence import Residence


class Executes(Protocol):
    """What executes the frames of such a session."""

    def run(self, header: Any, finish: Callable[[], None]) -> None:
        """Execute a RECORDS frame, and call ``finish`` at its end. Raises WireError for what is invalid."""

    def upload(
        self,
        id: Any,
        fields: Any,
        length: int,
        receive: Callable[[memoryview], None],
        finish: Callable[[], None],
    ) -> None:
        """Execute an UPLOAD frame of ``length`` bytes; ``receive`` fills a buffer with them."""

    def close(self) -> None:
        """Free everything."""

    def is_apart(self, header: Any = None) -> bool:
        """Whether a frame, of that header if it is a RECORDS frame, has nothing to do with the slices."""

    def needs_memory(self, header: Any) -> bool:
        """Whether a RECORDS frame may use the slices' memory."""

    def objection(self) -> str:
        """Return why the lease cannot move now, empty if it can."""

    def buffers(self) -> Mapping[int, Array]:
        """Return all arrays by their ids."""

    def describe(self) -> Any:
        """Describe the session at rest, apart from its arrays' elements, in plain values."""

    def restore(self, described: Any, contents: Mapping[int, Any]) -> None:
        """Be what :meth:`describe` described; ``contents`` has the bytes of arrays, by id.

        Raises ValueError and RuntimeError.
        """


#: Begins a session: called with the slices by the client's numbers, the position of each within the lease, how many
#: the lease has, and what sends an answer. Raises ImportError, with the reason, where the framework is not installed.
Begin = Callable[
    [Mapping[int, Device], Mapping[int, int], int, Callable[[Any, HostCopy | None], None]], Executes
]


class OtherSession:
    """Such a session, whose frames take turns with parking as those of PyTorch's sessions do.

    ``numbered``: the slices by the client's numbers.
    """

    def __init__(
        self, framework: str, executes: Executes, residence: Residence, numbered: Mapping[int, Device]
    ) -> None:
        self.framework = framework
        self.executes = executes
        self.numbered = numbered
        #: whether anything has a copy in host memory, see Residence
        self.has_copies = False
        self._residence = residence
        self._held: dict[int, HeldArray] = {}
        self._accounts = {device: device.join() for device in set(numbered.values())}
        residence.join(self)

    @property
    def storages(self) -> Mapping[int, HeldArray]:
        """All arrays by their ids: the same object for an array each time."""
        held = {}
        for id, array in self.executes.buffers().items():
            known = self._held.get(id)
            if known is None or known.array is not array:
                known = HeldArray(array, self.numbered[array.device])
            held[id] = known
        self._held = held
        return held

    def run(self, header: Any, finish: Callable[[], None]) -> None:
        """Execute a RECORDS frame."""
        if self.executes.is_apart(header):
            self.executes.run(header, finish)
            return
        gate = self._residence.gate
        gate.enter(None if self.executes.needs_memory(header) else [])
        try:
            self.executes.run(header, finish)
        finally:
            gate.leave()

    def upload(
        self,
        id: Any,
        fields: Any,
        length: int,
        receive: Callable[[memoryview], None],
        finish: Callable[[], None],
    ) -> None:
        """Execute an UPLOAD frame."""
        if self.executes.is_apart():
            self.executes.upload(id, fields, length, receive, finish)
            return
        gate = self._residence.gate
        gate.enter()
        try:
            self.executes.upload(id, fields, length, receive, finish)
        finally:
            gate.leave()

    def close(self) -> None:
        """Free everything."""
        self.executes.close()
        self._residence.leave(self)
        for device, account in self._accounts.items():
            device.leave(account)
