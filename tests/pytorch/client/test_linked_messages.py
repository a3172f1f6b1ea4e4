"""Tensors that ranks on several GPU servers of a lease send to each other, from worker to worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

import torch.distributed as dist  # noqa: E402

from .test_point_to_point import (  # noqa: E402
    PARTS,
    batch_at_once,
    begun_at_once,
    received_around,
    sent_around,
)
from .test_spread_ranks import through_this_process  # noqa: E402
from .two_ranks import SIZE, compare, run  # noqa: E402


def test_as_gloo_on_the_cpu(linked: Callable, tmp_path: Path) -> None:
    compare(linked(1, 1).spec, tmp_path, {**PARTS, "at once": begun_at_once, "batch": batch_at_once})


def test_three_ranks_of_two_servers_may_wait_for_each_other(linked: Callable, tmp_path: Path) -> None:
    parts = {"sent": sent_around, "received": received_around}
    found = run(linked(2, 1).spec, tmp_path / "store", parts, slices=(0, 2, 1))
    assert [found[rank]["sent"]["got"] for rank in range(3)] == [[2.0] * 3, [0.0] * 3, [1.0] * 3]
    assert found[0]["received"] == {"first": [1.0] * 3, "got": [2.0] * 3}
    assert found[2]["received"]["first"] == [1.0] * 3


def sent_back(device: str, rank: int) -> dict[str, Any]:
    """How many bytes pass this process while a large tensor goes to the other rank and back."""
    other = 1 - rank
    dist.all_reduce(torch.ones(1, device=device))  # both know each other from here on
    mine = torch.full((1_000_000,), float(rank), device=device)
    torch.cuda.synchronize()
    before = through_this_process()
    if rank == 0:
        dist.send(mine, other)
        dist.recv(mine, other)
    else:
        got = torch.empty_like(mine)
        work = dist.irecv(got, other)
        while not work.is_completed():
            pass
        mine = got + 1
        dist.isend(mine, other).wait()
    torch.cuda.synchronize()
    passed = through_this_process() - before
    return {"passed": passed, "is": mine.unique().tolist()}


def test_no_element_passes_the_clients(linked: Callable, tmp_path: Path) -> None:
    found = run(linked(1, 1).spec, tmp_path / "store", {"back": sent_back})
    assert [found[rank]["back"] for rank in range(SIZE)] == [{"passed": 0, "is": [1.0]}] * SIZE


def misfitting(device: str, rank: int) -> dict[str, Any]:
    """What a rank hears that receives too few elements, and what comes after that."""
    other, heard = 1 - rank, ""
    dist.all_reduce(torch.ones(1, device=device))
    if rank == 0:
        dist.send(torch.ones(3, device=device), other)
        dist.send(torch.full((4,), 7.0, device=device), other)
        return {}
    got = torch.zeros(4, device=device)
    try:
        dist.recv(got, other)
        torch.cuda.synchronize()
    except RuntimeError as e:
        heard = str(e)
    dist.recv(got, other)
    return {"heard": heard, "got": got.tolist()}


def test_a_message_that_does_not_fit_is_said_and_the_next_one_comes(linked: Callable, tmp_path: Path) -> None:
    found = run(linked(1, 1).spec, tmp_path / "store", {"misfitting": misfitting})[1]["misfitting"]
    assert "sends 3 elements of torch.float32 to a tensor of 4 elements of torch.float32" in found["heard"]
    assert found["got"] == [7, 7, 7, 7]
