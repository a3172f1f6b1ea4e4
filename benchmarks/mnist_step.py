"""A training step of the MNIST network, remote and local in one process, with one thread each."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import jupyter_gpupool

GOALS = {"remote_to_local": ("<=", 1.05)}

BATCH = 64
STEPS = 12
ROUNDS = 9


class Standard(nn.Module):
    """The sizes of PyTorch's own MNIST example, without dropout, so that both sides do the same arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10), nn.LogSoftmax(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class Trainer:
    def __init__(self, device: str) -> None:
        torch.manual_seed(1)
        self.device = device
        self.model = Standard().to(device)
        self.optimizer = torch.optim.Adadelta(self.model.parameters())
        generator = torch.Generator().manual_seed(2)
        self.data = [
            (
                torch.randn(BATCH, 1, 28, 28, generator=generator),
                torch.randint(0, 10, (BATCH,), generator=generator),
            )
            for _ in range(STEPS)
        ]

    def run(self) -> float:
        """Return the seconds per step, including the wait for the last loss."""
        began = time.perf_counter()
        for x, y in self.data:
            self.optimizer.zero_grad()
            loss = F.nll_loss(self.model(x.to(self.device)), y.to(self.device))
            loss.backward()
            self.optimizer.step()
        loss.item()
        return (time.perf_counter() - began) / STEPS


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with jupyter_gpupool.attach(num_gpus=1, partial=0.8):
            local, remote = Trainer("cpu"), Trainer("cuda")
            local.run(), remote.run()  # the first of each warms up
            pairs = [(local.run(), remote.run()) for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    return {
        "local_ms": round(1000 * statistics.median(a for a, _ in pairs), 2),
        "remote_ms": round(1000 * statistics.median(b for _, b in pairs), 2),
        "remote_to_local": round(statistics.median(b / a for a, b in pairs), 3),
        "remote_to_local_min": round(min(b / a for a, b in pairs), 3),
        "remote_to_local_max": round(max(b / a for a, b in pairs), 3),
        "rounds": ROUNDS,
        "steps_per_round": STEPS,
        "batch": BATCH,
    }
