"""Records which line of the program called an operator, to name it when the operator fails."""

from __future__ import annotations

import linecache
import os
import sys
from collections import deque
from pathlib import Path
from types import CodeType
from typing import Any

import torch

#: How many of the last calls are kept: many more than can be on their way to a worker.
KEPT = 1 << 14

_OURS = (os.path.dirname(torch.__file__) + os.sep, str(Path(__file__).resolve().parents[2]) + os.sep)


class _Inner(dict[str, bool]):
    """File name → whether it belongs to PyTorch or to this package, not to the program."""

    def __missing__(self, name: str) -> bool:
        if len(self) > 10_000:  # a notebook's cells have a name each
            self.clear()
        found = self[name] = name.startswith(_OURS)
        return found


_inner = _Inner()
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
            return _shown(found[1], found[2]) if found is not None and found[0] == made else ""
        changed = report.get("changed")
        if not isinstance(changed, list):
            return ""
        lines = {
            _shown(code, at)
            for storage, func, code, at in list(self._changed)
            if storage in changed and f"{func._schema.name}.{func._overloadname}" == report.get("operator")
        }
        return lines.pop() if len(lines) == 1 else ""  # no line is better than the wrong one


def _shown(code: CodeType, at: int) -> str:
    line = next((n for start, end, n in code.co_lines() if start <= at < end and n), code.co_firstlineno)
    text = linecache.getline(code.co_filename, line).strip()
    cell = _cell(code.co_filename)
    where = f"  {cell}" if cell else f'  File "{code.co_filename}"'
    where += f", line {line}, in {code.co_name}"
    return f"{where}\n    {text}" if text else where


def _cell(file: str) -> str:
    """``Cell In[3]`` for the file name of a notebook's cell, as in IPython's own tracebacks."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    number = getattr(getattr(shell, "compile", None), "_filename_map", {}).get(file)
    return f"Cell In[{number}]" if number is not None else ""
