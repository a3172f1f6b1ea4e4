"""torch.distributed with gloo exchanges leased tensors through the host."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

import torch.distributed as dist  # noqa: E402


def collect(store: str, rank: int, size: int) -> dict[str, Any]:
    """What each collective leaves in leased tensors, of process ``rank`` of ``size``."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        device_id=torch.device("cuda", 0),  # as Lightning does
    )
    try:
        x = torch.arange(2.0, device="cuda") + rank
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x)
        one = x.clone()
        dist.broadcast(one, size - 1)
        dist.barrier()
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1, bias=False).cuda())
        model(x).sum().backward()
        return {
            "all_gather": [p.tolist() for p in parts],
            "broadcast": one.tolist(),
            "all_reduce": x.tolist(),
            "device": x.device.type,
            "gradient": model.module.weight.grad.tolist(),
        }
    finally:
        dist.destroy_process_group()


def _run(spec: Any, store: str, rank: int, size: int, answers: Any) -> None:
    from jupyter_gpupool.pytorch.client import session

    session.activate(spec)
    answers.put((rank, collect(store, rank, size)))
    session.deactivate()


def test_a_world_of_one(attached: object, tmp_path: Path) -> None:
    found = collect(str(tmp_path / "store"), 0, 1)
    assert found["all_gather"] == [[0, 1]]
    assert found["broadcast"] == found["all_reduce"] == [0, 1]
    assert found["device"] == "cuda"
    assert found["gradient"] == [[0, 1]]


def test_two_processes(worker: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_run, args=(worker.spec, str(tmp_path / "store"), rank, 2, answers))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found[0] == found[1]
    assert found[0]["all_gather"] == [[0, 1], [1, 2]]
    assert found[0]["broadcast"] == [1, 2]
    assert found[0]["all_reduce"] == [1, 3]
