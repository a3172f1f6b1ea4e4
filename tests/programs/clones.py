"""Whether a public program can run here: its sources are cloned by who runs the tests, its libraries installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import pytest


class Public(Protocol):
    @property
    def repository(self) -> str: ...
    @property
    def libraries(self) -> Sequence[str]: ...


def missing(program: Public, clones: Mapping[str, str], installs: bool) -> str:
    """Why it cannot run here; empty if it can.

    ``clones``: the variable that names the clone of each repository; ``installs``: `make programs` installs libraries.
    """
    if not os.environ.get(clones[program.repository]):
        return f"{clones[program.repository]} names no clone of {program.repository}"
    absent = [name for name in program.libraries if importlib.util.find_spec(name) is None]
    advice = "; `make programs` does that" if installs else ""
    return f"{absent[0]} is not installed{advice}" if absent else ""


def runnable(program: Public, clones: Mapping[str, str], installs: bool = True) -> object:
    """The parameter of a test; skipped with the reason where it cannot run. Asked before a pool is started."""
    reason = missing(program, clones, installs)
    return pytest.param(program, id=str(program), marks=[pytest.mark.skip(reason=reason)] if reason else [])
