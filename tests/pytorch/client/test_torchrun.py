"""Whatever way ranks that torchrun starts end, nothing of them is left: no process, no connection, no memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.core import processes  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402
from tests.conftest import often  # noqa: E402

STEP = Path(__file__).with_name("torchrun_step.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENDS = ("ends", "raises", "killed")
#: Names a round in the environment of its processes.
ROUND = "GPUPOOL_TEST_ROUND"


def processes_of(round: str) -> list[str]:
    """What runs with that round in its environment. A port that they listen at goes with them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{ROUND}={round}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
        except OSError:
            continue  # another user's, or it has just ended
    return found


def connections(port: int) -> int:
    """How many connections that port has which both ends have not closed."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] in ("01", "08") for row in rows)


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.soak
def test_nothing_is_left_of_ranks_that_have_ended(
    start_worker: Callable, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    worker = start_worker(memory_mib=64)
    lease = tmp_path / "lease.json"
    lease.write_text(worker.spec.to_json())
    lease.chmod(0o600)
    holder = Lifeline(worker.spec, lives=processes.vouched)
    session.activate(worker.spec)

    #: Threads that the worker has after the first round, which starts some that stay.
    settled: list[int] = []
    #: How many there were when last looked at, and since when.
    seen, since = 0, 0.0

    def nothing_is_left() -> bool:
        nonlocal seen, since
        free = [torch.cuda.mem_get_info(k)[0] >> 10 for k in range(2)]
        if free != [64 << 10] * 2 or connections(worker.spec.port) > 2:
            return False
        now = threads(worker.process.pid)
        if settled:
            return now <= settled[0]
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > 1:  # none of them is about to end
            settled.append(now)
        return bool(settled)

    try:
        torch.cuda.synchronize()
        for number in range(often(3, 100)):
            round, end = str(uuid.uuid4()), ENDS[number % len(ENDS)]
            done = subprocess.run(
                [*TORCHRUN, str(STEP), end],
                env={**os.environ, ROUND: round, "GPUPOOL_LEASE": str(lease), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert (done.returncode == 0) == (end == "ends"), done.stdout[-2000:] + done.stderr[-6000:]
            eventually(lambda round=round: not processes_of(round), f"no process of round {number} ({end})")
            eventually(nothing_is_left, f"what there was before round {number} ({end}): {settled[-1:]}")
        assert (torch.ones(2, device="cuda:1") * 2).tolist() == [2, 2], "the lease goes on"
    finally:
        session.deactivate()
        holder.release()
