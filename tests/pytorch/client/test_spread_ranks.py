"""Ranks on several GPU servers of one lease, whose workers exchange tensors with each other over TLS."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from .test_nccl import every_collective, sharded, tensor_parallel, training, with_options  # noqa: E402
from .two_ranks import SIZE, compare, digits, run  # noqa: E402

PARTS = {
    "collectives": every_collective,
    "training": training,
    "sharded": sharded,
    "options": with_options,
    "tensor parallel": tensor_parallel,
}


def through_this_process() -> int:
    """How many bytes this process has exchanged with workers so far."""
    from jupyter_gpupool.pytorch.client.dispatch import attachment

    return sum(stream.bytes_up + stream.bytes_down for stream in attachment.streams())


def test_as_gloo_on_the_cpu(linked: Callable, tmp_path: Path) -> None:
    compare(linked(1, 1).spec, tmp_path, PARTS)


def summed(device: str, rank: int) -> dict[str, Any]:
    """Sums whose digits depend on the order of the ranks, in all ranks and in a group of two."""
    values = torch.rand(100_003, generator=torch.Generator().manual_seed(rank)) * 1e4
    mine = values.to(device)
    dist.all_reduce(mine)
    few = values.to(device)
    group = dist.new_group([0, 2])
    if rank != 1:
        dist.all_reduce(few, group=group)
    return {"all": digits(mine), "of two": digits(few)}


def test_three_ranks_of_two_servers_have_the_digits_of_one_server(
    linked: Callable, start_worker: Callable, tmp_path: Path
) -> None:
    parts, slices = {"summed": summed}, (0, 2, 1)
    expected = run(start_worker(3).spec, tmp_path / "one", parts, slices)
    assert run(linked(2, 1).spec, tmp_path / "two", parts, slices) == expected


def a_step(device: str, rank: int) -> dict[str, Any]:
    """How many bytes of a step of DistributedDataParallel pass this process, and how many its gradients have."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(500, 800), nn.Linear(800, 10)).to(device)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batch = torch.rand(4, 500, device=device) + rank
    passed = []
    for _ in range(5):
        before = through_this_process()
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        loss.item()
        passed.append(through_this_process() - before)
    return {"passed": passed[-1], "gradients": sum(4 * p.numel() for p in model.parameters())}


def test_no_gradients_pass_the_clients(linked: Callable, tmp_path: Path) -> None:
    found = run(linked(1, 1).spec, tmp_path / "store", {"step": a_step})
    for rank in range(SIZE):
        step = found[rank]["step"]
        assert step["gradients"] > 1_600_000
        assert step["passed"] < 16_000, "operators, and nothing that they compute with"


def _bereaved(spec: Any, store: str, rank: int, pipe: Any) -> None:
    from jupyter_gpupool.pytorch.client import session

    session.activate(spec)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timedelta(minutes=5)
    )
    x = torch.ones(3, device=f"cuda:{rank}")
    dist.all_reduce(x)
    pipe.send(x.tolist())
    pipe.recv()
    try:
        dist.all_reduce(x)
        torch.cuda.synchronize()
        pipe.send("nobody was missed")
    except RuntimeError as e:
        pipe.send(str(e))
    pipe.send((x.new_ones(2) * 2).tolist())
    os._exit(0)


@pytest.mark.parametrize("dies", ["rank", "worker"])
def test_a_rank_whose_peer_dies_hears_of_it_and_its_lease_goes_on(
    dies: str, linked: Callable, tmp_path: Path
) -> None:
    lease = linked(1, 1)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(SIZE):
        ours, theirs = context.Pipe()
        store = str(tmp_path / "store")
        processes.append(context.Process(target=_bereaved, args=(lease.spec, store, rank, theirs)))
        processes[-1].start()
        pipes.append(ours)
    try:
        for pipe in pipes:
            assert pipe.poll(600) and pipe.recv() == [2, 2, 2]
        if dies == "rank":
            os.kill(processes[1].pid, signal.SIGKILL)
            expected = "rank 1 has ended or left the lease"
        else:
            lease.workers[1].kill()
            expected = "the connection to the GPU server of rank 1 is lost"
        pipes[0].send(None)
        assert pipes[0].poll(600) and pipes[0].recv().startswith(expected)
        assert pipes[0].poll(600) and pipes[0].recv() == [2, 2]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _unlinked(spec: Any, store: str, rank: int, answers: Any) -> None:
    import logging

    from jupyter_gpupool.pytorch.client import session

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("jupyter_gpupool.pytorch.client").addHandler(handler)
    session.activate(spec)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    x = torch.ones(3, device=f"cuda:{rank}")
    dist.all_reduce(x)
    dist.all_reduce(x)
    answers.put((x.tolist(), lines))
    dist.destroy_process_group()


@pytest.mark.parametrize("closed_at", [(1,), (0, 1)], ids=["one", "both"])
def test_ranks_whose_servers_reach_each_other_in_no_direction_go_by_the_host_and_say_so_once(
    closed_at: tuple[int, ...], linked: Callable, tmp_path: Path
) -> None:
    def closed(port: int) -> int:
        return 1  # a privileged port, at which nobody listens

    spec = linked(1, 1, ways=dict.fromkeys(closed_at, closed)).spec
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = str(tmp_path / "store")
    processes = [context.Process(target=_unlinked, args=(spec, store, rank, answers)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    for values, lines in found:
        assert values == [4, 4, 4]
        assert len(lines) == (len(closed_at) == SIZE)
        assert all(
            "exchange tensors through this process: the other worker cannot be" in line for line in lines
        )
