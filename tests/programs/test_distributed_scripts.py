"""PyTorch's public scripts for several GPUs, unmodified, on the two GPUs of a lease: each runs to its end.

They draw without seeds, so there are no figures to compare; tests/pytorch/client/test_nccl.py compares digits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not os.environ.get("PYTORCH_EXAMPLES"), reason="PYTORCH_EXAMPLES names no clone of pytorch/examples"
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
#: The folder in ``distributed``, and its commands, one after the other.
SCRIPTS = {
    "ddp": ("ddp", (*TORCHRUN, "example.py")),
    "multigpu": ("ddp-tutorial-series", (sys.executable, "multigpu.py", "2", "1")),
    # The second time it goes on from its snapshot.
    "multigpu_torchrun": (
        "ddp-tutorial-series",
        (*TORCHRUN, "multigpu_torchrun.py", "2", "1"),
        (*TORCHRUN, "multigpu_torchrun.py", "4", "1"),
    ),
    "FSDP2": (
        "FSDP2",
        (*TORCHRUN, "example.py", "--explicit-prefetching"),
        (*TORCHRUN, "example.py", "--mixed-precision"),
    ),
    "FSDP2, distributed checkpoint": (
        "FSDP2",
        (*TORCHRUN, "example.py", "--dcp-api"),
        (*TORCHRUN, "example.py", "--dcp-api"),
    ),
    **{
        name: ("tensor_parallelism", (*TORCHRUN, f"{name}.py"))
        for name in ("tensor_parallel_example", "sequence_parallel_example", "fsdp_tp_example")
    },
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_to_its_end(
    leased: Mapping[str, str], tmp_path: Path, name: str, record: Callable[..., None]
) -> None:
    folder, *commands = SCRIPTS[name]
    copy = tmp_path / "run"
    shutil.copytree(Path(os.environ["PYTORCH_EXAMPLES"]) / "distributed" / folder, copy)
    for command in commands:
        done = subprocess.run(
            command,
            cwd=copy,
            env={**leased, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    record(
        f"pytorch/examples: distributed/{folder}, {name}",
        compared="nothing: it draws without a seed",
        result="runs to its end on two GPUs",
    )
