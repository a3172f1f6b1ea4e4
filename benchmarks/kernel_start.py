"""Start of a kernel that requests no GPU, with the pool's provisioner and with Jupyter's own.

Measured in alternating pairs in one run: from the call that starts a kernel to its process, where alone the
provisioners differ, and to the kernel's first reply, which is what a user notices.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager

GOALS = {"launch_more_ms": ("<=", 20.0)}

PAIRS = 15


def run() -> dict[str, Any]:
    plain, pooled = _kernelspec("plain", None), _kernelspec("pooled", "gpupool-provisioner")
    _start(plain), _start(pooled)  # the first of each imports
    launches, answers = [], []
    for _ in range(PAIRS):
        (a, ready_a), (b, ready_b) = _start(plain), _start(pooled)
        launches.append((a, b))
        answers.append((ready_a, ready_b))
    return {
        "launch_ms": round(statistics.median(a for a, _ in launches), 2),
        "launch_with_the_pools_ms": round(statistics.median(b for _, b in launches), 2),
        "launch_more_ms": round(statistics.median(b - a for a, b in launches), 2),
        "first_answer_ms": round(statistics.median(a for a, _ in answers), 1),
        "first_answer_with_the_pools_ms": round(statistics.median(b for _, b in answers), 1),
        "first_answer_ratio": round(statistics.median(b / a for a, b in answers), 3),
        "pairs": PAIRS,
    }


def _kernelspec(name: str, provisioner: str | None) -> str:
    spec: dict[str, Any] = {
        "argv": ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": name,
        "language": "python",
    }
    if provisioner:
        spec["metadata"] = {"kernel_provisioner": {"provisioner_name": provisioner}}
    folder = Path(os.environ["JUPYTER_DATA_DIR"], "kernels", name)
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    return name


def _start(kernel: str) -> tuple[float, float]:
    """Return the milliseconds to the kernel's process, and to its first reply."""
    manager = KernelManager(kernel_name=kernel)
    began = time.perf_counter()
    manager.start_kernel()
    launched = time.perf_counter() - began
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        ready = time.perf_counter() - began
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    return launched * 1e3, ready * 1e3
