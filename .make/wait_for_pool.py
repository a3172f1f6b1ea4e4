"""Waits until the pools that were started for one job have ended, which they do a moment after it."""

from __future__ import annotations

import contextlib
import time

import psutil

MAX_WAIT_S = 10


def is_running(process: psutil.Process) -> bool:
    """A process that has ended and waits for its parent to notice does not count."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


pools = [
    process
    for process in psutil.process_iter(["cmdline"])
    if any(word.startswith("--GPUPoolServer.starter_fd") for word in process.info["cmdline"] or [])
]
deadline = time.monotonic() + MAX_WAIT_S
while any(map(is_running, pools)) and time.monotonic() < deadline:
    time.sleep(0.05)
