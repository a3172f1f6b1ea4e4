"""Whether processes run, told without an error where one ends at that moment."""

from __future__ import annotations

import contextlib

import psutil


def runs(process: int | psutil.Process) -> bool:
    """Whether a process still runs; one that has ended does not, whether or not its parent has noticed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = process if isinstance(process, psutil.Process) else psutil.Process(process)
        return found.is_running() and found.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def command_line(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.cmdline()
    return []
