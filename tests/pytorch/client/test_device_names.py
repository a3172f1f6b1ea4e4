"""The names of a slice all mean the same. Other tests use one of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

NAMES = ["cuda", "cuda:0", "cuda:1", "gpupool", "gpupool:0", "gpupool:1"]


def results(device: str) -> list[torch.Tensor]:
    """What a program computes that uses every way from a name to a tensor."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.LSTM(8, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    drawn = torch.randn(5, 6, generator=torch.Generator(device).manual_seed(3), device=device)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            out, _ = model(drawn)
        out.float().pow(2).mean().backward()
        optimizer.step()
    views = torch.arange(24.0, device=device).view(2, 3, 4)
    views.transpose(0, 2)[1:, :, 0].mul_(-1)
    file = io.BytesIO()
    torch.save(views, file)
    file.seek(0)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: x.sin().sum()))(drawn)
    with torch.inference_mode():
        normed = nn.functional.layer_norm(drawn, (6,))
    found = [
        *(p.detach() for p in model.parameters()),
        drawn[drawn > 0],
        views,
        torch.load(file, map_location=device),
        torch.tensor([[1, 2], [3, 4]]).to(device, non_blocking=True),
        torch.rand(3, device=device),
        per_sample,
        normed,
    ]
    assert all(str(tensor.device).startswith(device) for tensor in found)
    return [tensor.cpu() for tensor in found]


@pytest.fixture(scope="module")
def of_first() -> list[list[torch.Tensor]]:
    """The results for the first name, once they are known."""
    return []


@pytest.mark.parametrize("device", NAMES)
def test_every_name_gives_the_same_results(
    attached: object, device: str, of_first: list[list[torch.Tensor]]
) -> None:
    found = results(device)
    if not of_first:
        of_first.append(found)
    for ours, first in zip(found, of_first[0], strict=True):
        assert torch.equal(ours, first)


@pytest.mark.parametrize("device", NAMES)
def test_a_tensor_is_on_the_device_that_it_was_made_on(attached: object, device: str) -> None:
    full = device if ":" in device else f"{device}:0"
    for made in (
        torch.zeros(3, device=device),
        torch.arange(12, device=device),
        torch.eye(3, device=torch.device(device)),
        torch.empty(2).to(device),
        nn.Linear(2, 2, device=device).weight,
    ):
        assert str(made.device) == full
        assert made.device == torch.device(full)
    index = int(full.rpartition(":")[2])
    for other in (f"cuda:{index}", f"gpupool:{index}"):
        assert torch.ones(2, device=device).to(other).tolist() == [1, 1]


def test_a_number_names_a_gpu(attached: object) -> None:
    model = nn.Linear(2, 2).to(1)
    moved = [
        model.weight,
        nn.Linear(2, 2).to(device=1).weight,
        torch.ones(2).to(1),
        torch.tensor([1.0], device=1),
    ]
    assert [(str(tensor.device), tensor.is_cuda) for tensor in moved] == [("cuda:1", True)] * len(moved)
    assert nn.Linear(2, 2).to(torch.float64).weight.device.type == "cpu"


def test_a_sharded_tensor_is_where_its_part_is(attached: object, tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        whole = torch.ones(4, device="cuda:1")
        sharded = DTensor.from_local(whole, init_device_mesh("cuda", (1,)), [Shard(0)])
        assert (str(sharded.device), sharded.is_cuda) == ("cuda:1", True)
    finally:
        dist.destroy_process_group()
