"""Records which line of the program started what runs on a slice, to name it when that fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import CodeType

import jax
import jaxlib

from jupyter_gpupool.core.source_lines import Inner, shown

#: How many of the last calls are kept: many more than can be on their way to a worker.
KEPT = 1 << 14

_inner = Inner(
    *(os.path.dirname(str(package.__file__)) + os.sep for package in (jax, jaxlib)),
    str(Path(__file__).resolve().parents[2]) + os.sep,
    "<frozen ",
)


class Sites:
    """The last calls of one session, by the id of the first array that each makes. Safe to use from threads."""

    def __init__(self) -> None:
        self._made: list[tuple[int, CodeType, int] | None] = [None] * KEPT

    def made(self, id: int) -> None:
        """Record the line of the program that is being executed in this thread."""
        frame = sys._getframe(1)
        while frame is not None and _inner[frame.f_code.co_filename]:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            self._made[id & (KEPT - 1)] = (id, frame.f_code, frame.f_lasti)

    def of(self, id: object) -> str:
        """Return the line at which an array was made, as a traceback shows it; empty if it is not known any more."""
        found = self._made[id & (KEPT - 1)] if isinstance(id, int) else None
        return shown(found[1], found[2]) if found is not None and found[0] == id else ""
