"""Training on a slice has the same results as on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """PyTorch's own MNIST example's layers, in words of our own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(16 * 144, 32),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(32, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.head(self.features(x)), dim=1)


def losses(
    device: str, dropout: float = 0.0, optimizer: type = torch.optim.Adadelta, steps: int = 6
) -> list[float]:
    torch.manual_seed(1)
    data = [(torch.randn(16, 1, 28, 28), torch.randint(0, 10, (16,))) for _ in range(steps)]
    model = Net(dropout).to(device)
    optim = optimizer(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optim, step_size=2, gamma=0.7)
    found = []
    torch.manual_seed(2)
    for x, y in data:
        optim.zero_grad()
        loss = F.nll_loss(model(x.to(device)), y.to(device))
        loss.backward()
        optim.step()
        schedule.step()
        found.append(loss.detach())
    model.eval()
    with torch.no_grad():
        found.append(F.nll_loss(model(data[0][0].to(device)), data[0][1].to(device)))
    return [value.item() for value in found]


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adadelta, torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]
)
def test_losses_are_those_of_the_cpu_digit_for_digit(attached: object, optimizer: type) -> None:
    local = losses("cpu", optimizer=optimizer)
    assert local[0] != local[1], "it does not train"
    assert losses("gpupool:0", optimizer=optimizer) == local
    assert losses("gpupool:1", optimizer=optimizer) == local
    assert losses("cuda", optimizer=optimizer) == local


def test_a_seed_gives_the_same_dropout_every_time_and_on_either_device(attached: object) -> None:
    first = losses("gpupool:0", dropout=0.5)
    assert first != losses("gpupool:0", dropout=0.0)
    assert losses("gpupool:0", dropout=0.5) == first
    assert losses("gpupool:1", dropout=0.5) == first


def test_random_state_is_each_slices_own(attached: object) -> None:
    torch.manual_seed(7)
    a = torch.rand(3, device="cuda:0")
    b = torch.rand(3, device="cuda:1")
    assert a.tolist() == b.tolist()
    state = torch.cuda.get_rng_state(1)
    c = torch.rand(3, device="cuda:1")
    torch.cuda.set_rng_state(state, 1)
    assert torch.rand(3, device="cuda:1").tolist() == c.tolist() != b.tolist()


def test_a_model_across_both_slices(attached: object) -> None:
    torch.manual_seed(3)
    lower, upper = nn.Linear(4, 8), nn.Linear(8, 2)
    x = torch.randn(5, 4)
    expected = upper(lower(x).relu()).pow(2).mean()
    expected.backward()
    wanted = [p.grad.clone() for p in (*lower.parameters(), *upper.parameters())]
    for p in (*lower.parameters(), *upper.parameters()):
        p.grad = None
    lower.to("cuda:0")
    upper.to("cuda:1")
    loss = upper(lower(x.to("cuda:0")).relu().to("cuda:1")).pow(2).mean()
    loss.backward()
    assert loss.item() == expected.item()
    for p, gradient in zip((*lower.parameters(), *upper.parameters()), wanted):
        assert torch.equal(p.grad.cpu(), gradient)


def test_attention_trains(attached: object) -> None:
    def run(device: str) -> list[float]:
        torch.manual_seed(4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).to(device)
        optim = torch.optim.Adam(layer.parameters())
        x = torch.randn(2, 5, 16).to(device)
        found = []
        for _ in range(3):
            optim.zero_grad()
            loss = layer(x).pow(2).mean()
            loss.backward()
            optim.step()
            found.append(loss.item())
        return found

    assert run("cuda") == pytest.approx(run("cpu"), rel=1e-5)
