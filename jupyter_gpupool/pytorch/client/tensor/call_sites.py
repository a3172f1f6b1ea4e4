"""Records which line of the program called an operator, to name it when the operator fails."""

from __future__ import annotations

import os
import sys
from collections import deque
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from jupyter_gpupool.core.source_lines import Inner, shown

#: How many of the last calls are kept: many more than can be on their way to a worker.
KEPT = 1 << 14

_OURS = (os.path.dirname(torch.__file__) + os.sep, str(Path(__file__).resolve().parents[2]) + os.sep)


_inner = Inner(*_OURS)
_getframe = sys._getframe


class Sites:
    """The last calls of one session, by the storage that each created or changed. Safe to use from threads."""

    def __init__(self) -> None:
        self._made: list[tuple[int, CodeType, int] | None] = [None] * KEPT
        self._changed: deque[tuple[int, Any, CodeType, int]] = deque(maxlen=KEPT)

    def made(self, storage: int) -> None:
        """Record the line that calls the operator which creates ``storage``."""
        frame = _getframe(2)
        while frame is not None and _inner[frame.f_code.co_filename]:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            self._made[storage & (KEPT - 1)] = (storage, frame.f_code, frame.f_lasti)

    def changed(self, storage: int, func: Any) -> None:
        """Record the line that calls ``func``, which changes ``storage``."""
        frame = _getframe(2)
        while frame is not None and _inner[frame.f_code.co_filename]:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            self._changed.append((storage, func, frame.f_code, frame.f_lasti))

    def of(self, report: dict[str, Any]) -> str:
        """The line that called the operator of a worker's report, as a traceback shows it. "" if unknown."""
        made = report.get("made")
        if isinstance(made, int):
            found = self._made[made & (KEPT - 1)]
            return shown(found[1], found[2]) if found is not None and found[0] == made else ""
        changed = report.get("changed")
        if not isinstance(changed, list):
            return ""
        lines = {
            shown(code, at)
            for storage, func, code, at in list(self._changed)
            if storage in changed and f"{func._schema.name}.{func._overloadname}" == report.get("operator")
        }
        return lines.pop() if len(lines) == 1 else ""  # no line is better than the wrong one
