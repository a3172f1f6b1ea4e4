"""Arrays of other frameworks than PyTorch, as parking and moving see them: bytes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .device import Device

if TYPE_CHECKING:
    from .residence import Copy

#: How long the arrays of a worker at rest may take together to be computed, in seconds.
COMPUTE_TIMEOUT_S = 10.0


class Array(Protocol):
    """An array of a session. Nothing changes its elements once they are there."""

    device: int
    nbytes: int

    def content(self, timeout_s: float) -> Any:
        """Return its bytes in place, as NumPy's array, once they are computed; None where there are none, or not here.

        Raises TimeoutError.
        """

    def let_go(self, fetch: Callable[[], None]) -> None:
        """Drop the elements. ``fetch`` brings them back; it is called before they are used."""

    def bring(self, content: Any) -> None:
        """Have the elements again, on bytes that nothing changes any more."""


class HeldArray:
    """An array, with what a storage has for parking."""

    __slots__ = ("array", "copy", "device")

    def __init__(self, array: Array, device: Device) -> None:
        self.array = array
        self.device = device
        #: a copy of it in host memory, which stays valid
        self.copy: Copy | None = None

    def wait(self, until: float) -> None:
        """Wait for its bytes until that time of a monotonic clock. Raises TimeoutError."""
        self.array.content(max(0.0, until - time.monotonic()))

    @property
    def base(self) -> torch.Tensor | None:
        """Its bytes; None where there are none, or only the copy. Raises TimeoutError if they are being computed."""
        content = self.array.content(0.0)
        return None if content is None else torch.from_numpy(content)

    @base.setter
    def base(self, memory: torch.Tensor | None) -> None:
        if memory is None:
            self.array.let_go(self._fetch)
        else:
            self.array.bring(memory.numpy())

    def _fetch(self) -> None:
        if self.copy is not None:
            self.copy.fetch()
