"""``nn.DataParallel`` over the lease's slices, and the copies between slices that it makes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import comm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.seen: list[tuple] = []

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        self.seen.append((str(x.device), len(x), torch.is_autocast_enabled()))
        return {"out": self.last(self.norm(self.first(x)).relu()) * scale}


def test_it_splits_computes_and_gathers_like_one_device(attached: object) -> None:
    torch.manual_seed(0)
    net = Net()
    net.norm = nn.LayerNorm(8)  # alike for a whole batch and for its parts
    local = copy.deepcopy(net)
    x = torch.randn(10, 6)
    parallel = nn.DataParallel(net.cuda())
    out = parallel(x.cuda(), scale=2.0)["out"]
    expected = local(x, scale=2.0)["out"]
    torch.testing.assert_close(out.cpu(), expected)
    assert str(out.device) == "cuda:0"
    assert sorted(net.seen) == [("cuda:0", 5, False), ("cuda:1", 5, False)]
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for a, b in zip(net.parameters(), local.parameters()):
        assert a.grad is not None
        assert str(a.grad.device) == "cuda:0"
        torch.testing.assert_close(a.grad.cpu(), b.grad)


def test_it_trains(attached: object) -> None:
    torch.manual_seed(0)
    parallel = nn.DataParallel(Net().cuda())
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.05)
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(parallel(x)["out"], y.cuda())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert parallel.module.norm.num_batches_tracked.item() == 12
    assert list(parallel.state_dict()) == [f"module.{k}" for k in parallel.module.state_dict()]


def test_autocast_reaches_every_slice(attached: object) -> None:
    parallel = nn.DataParallel(Net().cuda())
    with torch.autocast("cuda"):
        out = parallel(torch.randn(4, 6).cuda())["out"]
    assert out.dtype is torch.float16
    assert {(device, cast) for device, _, cast in parallel.module.seen} == {
        ("cuda:0", True),
        ("cuda:1", True),
    }


def test_fewer_rows_than_slices_and_errors_inside(attached: object) -> None:
    parallel = nn.DataParallel(nn.Linear(2, 2).cuda())
    assert parallel(torch.ones(1, 2).cuda()).shape == (1, 2)
    with pytest.raises(RuntimeError, match="in replica . on device"):
        parallel(torch.ones(4, 5).cuda())
    other = nn.Linear(2, 2).to("cuda:1")
    with pytest.raises(RuntimeError, match="module must have its parameters and buffers on device cuda:0"):
        nn.DataParallel(other)(torch.ones(4, 2).cuda())


def test_copies_between_slices(attached: object) -> None:
    x = torch.arange(10.0, device="cuda:0")
    parts = comm.scatter(x, [0, 1], chunk_sizes=[3, 7])
    assert [(str(p.device), len(p)) for p in parts] == [("cuda:0", 3), ("cuda:1", 7)]
    whole = comm.gather(parts, destination=1)
    assert str(whole.device) == "cuda:1"
    assert whole.tolist() == x.tolist()
    assert comm.gather(parts, destination="cpu").device.type == "cpu"
    first, second = comm.broadcast(x, [0, 1])
    assert str(second.device) == "cuda:1"
    assert second.tolist() == first.tolist() == x.tolist()
    total = comm.reduce_add([first, second], destination=0)
    assert total.tolist() == (2 * x).tolist()
    assert str(total.device) == "cuda:0"
    halves = [torch.empty(5, device="cuda:0"), torch.empty(5, device="cuda:1")]
    comm.scatter(x, out=halves)
    assert torch.cat([h.cpu() for h in halves]).tolist() == x.tolist()
    (a, b), (c, d) = comm.broadcast_coalesced([x, x + 1], [0, 1])
    assert str(c.device) == str(d.device) == "cuda:1"
    assert d.tolist() == b.tolist()
    (sums,) = comm.reduce_add_coalesced([[a], [c]], destination=0)
    assert sums.tolist() == (2 * x).tolist()


def test_a_copy_is_ordered_with_the_work_on_both_sides(attached: object) -> None:
    source = torch.zeros(1000, device="cuda:0")
    for n in range(20):
        source.fill_(n)
        target = source.to("cuda:1", non_blocking=True)
        source.fill_(-1)
        assert target.sum().item() == 1000 * n
