"""Whether processes run, told without an error where one ends at that moment; and how one is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

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


def stop(pid: int) -> None:
    """Stop a process as SIGSTOP does, and return once none of its threads runs: each notices the signal by itself."""
    os.kill(pid, signal.SIGSTOP)
    while any(_state(thread) not in "TtZX" for thread in Path(f"/proc/{pid}/task").glob("*/stat")):
        time.sleep(0.01)


def _state(stat: Path) -> str:
    """The state of a thread, of the letters in proc(5); X if it has ended."""
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0]
    return "X"
