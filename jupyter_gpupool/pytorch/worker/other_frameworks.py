"""Sessions of other frameworks than PyTorch, which a worker serves on the same slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .device import Device, HostCopy
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


#: Begins a session: called with the slices by the client's numbers, the position of each within the lease, how many
#: the lease has, and what sends an answer. Raises ImportError, with the reason, where the framework is not installed.
Begin = Callable[
    [Mapping[int, Device], Mapping[int, int], int, Callable[[Any, HostCopy | None], None]], Executes
]


class OtherSession:
    """Such a session, whose frames take turns with parking as those of PyTorch's sessions do.

    Its memory stays where it is: while the session lasts, the lease is neither parked nor moved.
    """

    def __init__(self, framework: str, executes: Executes, residence: Residence) -> None:
        self._executes = executes
        self._residence = residence
        residence.bind(f"a process uses it by {framework}, whose memory stays where it is")

    def run(self, header: Any, finish: Callable[[], None]) -> None:
        """Execute a RECORDS frame."""
        gate = self._residence.gate
        gate.enter()
        try:
            self._executes.run(header, finish)
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
        gate = self._residence.gate
        gate.enter()
        try:
            self._executes.upload(id, fields, length, receive, finish)
        finally:
            gate.leave()

    def close(self) -> None:
        """Free everything."""
        self._executes.close()
        self._residence.unbind()
