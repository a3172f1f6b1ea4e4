"""Which process is which: a number alone does not say, for the system uses it again."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1

#: ``python -m`` looks in the current directory first, where a user's types.py or queue.py may lie.
_RUN_MODULE = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + sys.argv[1:2]; module = sys.argv[2]; "
    "del sys.argv[1:3]; import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """What runs this package's ``module`` in a process of its own, whatever lies in the current directory."""
    home = str(Path(__file__).resolve().parents[2])  # last in the path, should nothing else lead to it
    return [sys.executable, "-c", _RUN_MODULE, home, module, *arguments]


def birth(pid: int) -> float | None:
    """When that process began, or None if none runs (a dead one that nobody has reaped does not).

    Compare for equality only. On Linux it is in clock ticks since the machine's start, so that setting
    the clock changes nothing.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", "rb") as f:
                fields = f.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] in (b"Z", b"X") else float(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def lives(pid: int, born: float) -> bool:
    """Whether this very process, not another one with its number, runs."""
    return pid > 0 and birth(pid) == born


def send(pid: int, born: float, number: int) -> None:
    """Send a signal to this very process, if it runs."""
    if lives(pid, born):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it ended by itself just now


async def kill(pid: int, born: float, timeout_s: float) -> bool:
    """Kill it; whether it is gone when this returns."""
    try:
        watch = os.pidfd_open(pid)
    except OSError:
        return not lives(pid, born)
    try:
        if not lives(pid, born):
            return True
        signal.pidfd_send_signal(watch, signal.SIGKILL)
        ended, _, _ = await asyncio.to_thread(select.select, [watch], [], [], timeout_s)
        return bool(ended)
    finally:
        os.close(watch)


def die_with_parent(parent: int) -> bool:
    """Ask the kernel (Linux) to kill this process when ``parent`` ends; False if it has ended already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent
