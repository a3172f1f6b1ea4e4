"""Inference mode, in which the device receives composite operators undecomposed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn


@pytest.fixture
def device(attached: object) -> str:
    """test_device_names shows that the others are the same."""
    return "gpupool:1"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.t(),
        lambda x: x.t().t(),
        lambda x: x.detach()[1:],
        lambda x: x.t().reshape(-1),
        lambda x: x.reshape(4, 3),
        lambda x: x.t().flatten(),
        lambda x: x.t().contiguous(),
        lambda x: x.t()[:, :2].reshape(2, 4),
        lambda x: x.t().ravel(),
        lambda x: x.t().reshape_as(x),
        lambda x: x.double().to(torch.float32),
        lambda x: torch.cat(x.chunk(2)),
        lambda x: x.t().expand(2, 4, 3).sum(0),
        lambda x: nn.functional.linear(x, x),
        lambda x: torch.einsum("ij,kj->ik", x, x),
        lambda x: x.softmax(1).matmul(x.t()),
        lambda x: x.unflatten(1, (2, 2)).movedim(0, 2),
    ],
)
@pytest.mark.parametrize("inside", [True, False], ids=["made inside", "made outside"])
def test_results_are_the_cpus(device: str, change: object, inside: bool) -> None:
    x = torch.arange(12.0).view(3, 4)
    remote = x.to(device)
    with torch.inference_mode():
        if inside:
            x, remote = x + 0, remote + 0
        assert remote.is_inference() is inside
        ours, theirs = change(remote), change(x)  # type: ignore[operator]
        assert ours.is_inference() == theirs.is_inference()
        assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(ours.cpu(), theirs)


def test_views_share_memory_and_copies_do_not(device: str) -> None:
    with torch.inference_mode():
        x = torch.zeros(2, 3, device=device)
        x.reshape(3, 2).fill_(1)
        x.t().reshape(-1).fill_(2)
        x.contiguous()[0, 0] = 3
    assert x.tolist() == [[3, 1, 1], [1, 1, 1]]


def test_models(device: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "net": nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)
            ),
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        }
    ).eval()
    remote = copy.deepcopy(model).to(device)
    x = torch.randn(5, 1, 6, 6)
    found = []
    for m, place in ((model, "cpu"), (remote, device)):
        with torch.inference_mode():
            y = m["net"](x.to(place))
            for hidden in (
                [3, 4],
                [0, 1],
            ):  # only the first is known as padding, and becomes 0
                mask = torch.tensor([[n in hidden for n in range(5)]], device=place)
                found.append(m["encoder"](y[None], src_key_padding_mask=mask).cpu())
    torch.testing.assert_close(found[2:], found[:2])
    assert not found[0][0, 3:].any()
    assert found[1].all()
