"""What people start several processes with, on the two GPUs of a lease and in two processes of the CPU with gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.ports import free_port

from .to_the_end import run_to_the_end

LAUNCHED = Path(__file__).with_name("launched")
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
ACCELERATE = "-m accelerate.commands.launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
#: Ray reports its use to nobody, and has time to start on a busy machine.
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_raylet_start_wait_time_s": "200",
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_worker_register_timeout_seconds": "180",
}


class Launch(NamedTuple):
    """Python's arguments on the lease, and on the CPU; the library that it needs."""

    library: str
    on_lease: str
    on_cpu: str = ""


LAUNCHES = {
    "torchrun, a snapshot and sharded parameters": Launch("torch", f"{TORCHRUN} with_torchrun.py"),
    "Lightning, ddp": Launch("lightning", "with_lightning.py ddp"),
    "Lightning, auto": Launch("lightning", "with_lightning.py auto", "with_lightning.py ddp"),
    "accelerate launch": Launch(
        "accelerate",
        f"{ACCELERATE} --multi_gpu --main_process_port {{port}} with_accelerate.py launch",
        f"{TORCHRUN} with_accelerate.py launch",
    ),
    "accelerate, notebook_launcher": Launch(
        "accelerate", "with_accelerate.py notebook {port}", f"{TORCHRUN} with_accelerate.py launch"
    ),
    "transformers, Trainer under torchrun": Launch("transformers", f"{TORCHRUN} with_trainer.py"),
    "joblib, tasks": Launch("joblib", "with_tasks.py joblib"),
    "Ray, tasks": Launch("ray", "with_tasks.py ray"),
}


def found_by(arguments: str, folder: Path, environment: Mapping[str, str], **more: str) -> Any:
    """What a program answers. On the CPU, where PyTorch's own ranks may abort at their end, its answer is enough."""
    folder.mkdir()
    answer = folder / "found.json"
    try:
        run_to_the_end(
            [sys.executable, *arguments.format(port=free_port()).split(), str(answer)],
            LAUNCHED,
            {**environment, "OMP_NUM_THREADS": "1", **RAY, **more},
        )
    except AssertionError:
        if "ON_CPU" not in more or not answer.exists():
            raise
    return json.loads(answer.read_text())


@pytest.mark.parametrize("name", LAUNCHES)
def test_it_trains_what_two_processes_of_the_cpu_train(
    leased: Mapping[str, str], tmp_path: Path, name: str, record: Callable[..., None]
) -> None:
    launch = LAUNCHES[name]
    if importlib.util.find_spec(launch.library) is None:
        pytest.skip(f"{launch.library} is not installed; `make programs` does that")
    found = found_by(launch.on_lease, tmp_path / "gpu", leased)
    expected = found_by(launch.on_cpu or launch.on_lease, tmp_path / "cpu", os.environ, ON_CPU="1")
    for part in (found, *found.get("tasks", ())):
        assert part.pop("kind", "cuda") == "cuda"
    for part in (expected, *expected.get("tasks", ())):
        assert part.pop("kind", "cpu") == "cpu"
    for part in (*found.get("tasks", ()), *expected.get("tasks", ())):
        part.pop("world")
    assert found == expected
    figures = json.dumps(found).count(".")
    record(name, compared=f"{figures} losses and weights, on two GPUs", result="the same digits")
