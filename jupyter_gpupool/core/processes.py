"""Identify processes reliably: a process id alone is not enough, because the system reuses ids."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1

#: ``python -m`` looks in the current directory first, where a user's types.py or queue.py may lie.
_RUN_MODULE = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + sys.argv[1:2]; module = sys.argv[2]; "
    "del sys.argv[1:3]; import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str, python: str = "") -> list[str]:
    """Return the command line that runs this package's ``module``, whatever files are in the current directory.

    ``python``: another interpreter than this one.
    """
    home = str(Path(__file__).resolve().parents[2])  # last in the path, in case the package is not installed
    return [python or sys.executable, "-c", _RUN_MODULE, home, module, *arguments]


def birth(pid: int) -> float | None:
    """Return when that process started; None if it does not run (a zombie does not).

    Compare for equality only. On Linux the value is in clock ticks since boot, so it does not depend on the clock.
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
    """Return whether this process runs, and not another one with the same id."""
    return pid > 0 and birth(pid) == born


def identity() -> dict[str, Any]:
    """Return what identifies this process to others: its machine ("" if that has no name), process id and birth."""
    return {"machine": _machine(), "pid": os.getpid(), "born": birth(os.getpid())}


def vouched(process: Any) -> bool | None:
    """Return whether the process of that :func:`identity` runs; None if it is not one of this machine."""
    if not isinstance(process, dict) or not process.get("machine") or process["machine"] != _machine():
        return None
    pid, born = process.get("pid"), process.get("born")
    return lives(pid, born) if isinstance(pid, int) and isinstance(born, float) else None


def _machine() -> str:
    """The system's boot and the namespace of its process ids: within both, a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def send(pid: int, born: float, number: int) -> None:
    """Send a signal to this process, if it runs."""
    if lives(pid, born):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it ended in this moment


def kill_group(pid: int, born: float | None) -> None:
    """Kill what is left of the group that a process led, which has just ended; nothing if it led none.

    Its id is given to no other process before it is reaped, nor while anybody is in its group.
    """
    if pid > 1 and birth(pid) in (None, born):  # 0 and 1 would mean other groups
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left


async def kill(pid: int, born: float, timeout_s: float) -> bool:
    """Kill the process; return whether it has ended within ``timeout_s`` seconds."""
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
    """Have Linux kill this process when ``parent`` ends; return False if ``parent`` has ended already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent
