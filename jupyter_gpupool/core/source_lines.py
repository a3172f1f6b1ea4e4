"""Lines of a program, as a traceback shows them."""

from __future__ import annotations

import linecache
import sys
from types import CodeType


class Inner(dict[str, bool]):
    """File name → whether it is in one of those folders, and thus not the program's."""

    def __init__(self, *folders: str) -> None:
        super().__init__()
        self._folders = folders

    def __missing__(self, name: str) -> bool:
        if len(self) > 10_000:  # a notebook's cells have a name each
            self.clear()
        found = self[name] = name.startswith(self._folders)
        return found


def shown(code: CodeType, at: int) -> str:
    """Return the line of the instruction at ``at``."""
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
