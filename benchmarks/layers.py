"""Steps of small recurrent and attention networks, and the first step of each, remote and local with one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import jupyter_gpupool

GOALS = {"remote_to_local": ("<=", 3.0)}

ROUNDS = 15

Step = Callable[[], float]


class WordLanguageModel(nn.Module):
    """The parts of PyTorch's example of that name, with its default sizes divided by three, on 1,000 words."""

    def __init__(self, words: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(words, width), nn.Linear(width, words)
        self.drop, self.rnn = nn.Dropout(0.2), nn.LSTM(width, width, 2, dropout=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.rnn(self.drop(self.encoder(x)))
        return F.log_softmax(self.decoder(self.drop(out)).flatten(0, 1), 1)


def lstm(device: str) -> Step:
    """Two layers of 64, on 8 sequences of 35: forward and backward."""
    network, x = nn.LSTM(64, 64, 2).to(device), torch.randn(35, 8, 64, device=device)

    def step() -> float:
        network.zero_grad()
        network(x)[0].sum().backward()
        return float(network.weight_ih_l0.grad[0, 0])

    return step


def word_language_model(device: str) -> Step:
    """A training step on 20 sequences of 35 words, with its gradients clipped."""
    network = WordLanguageModel().to(device)
    x, y = (torch.randint(0, 1000, size, device=device) for size in ((35, 20), (700,)))

    def step() -> float:
        network.zero_grad()
        loss = F.nll_loss(network(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.25)
        for p in network.parameters():
            p.data.add_(p.grad, alpha=-0.1)
        return loss.item()

    return step


def transformer_layer(device: str) -> Step:
    """nn.TransformerEncoderLayer(64, 4, 128) on 8 sequences of 35: forward and backward."""
    network = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(device)
    x = torch.randn(8, 35, 64, device=device)

    def step() -> float:
        network.zero_grad()
        network(x).square().sum().backward()
        return float(network.linear1.weight.grad[0, 0])

    return step


def transformer_layer_inference(device: str) -> Step:
    """The same layer in evaluation, without gradients."""
    network = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).to(device).eval()
    x = torch.randn(8, 35, 64, device=device)

    @torch.no_grad()
    def step() -> float:
        return network(x).sum().item()

    return step


def measure(make: Callable[[str], Step]) -> dict[str, float]:
    """Return milliseconds of a step on both sides, the median of their ratios, and the remote's first step."""
    local, remote = make("cpu"), make("cuda")
    local()
    torch.cuda.synchronize()
    first_s = _seconds(remote)
    _seconds(remote)
    pairs = [(_seconds(local), _seconds(remote)) for _ in range(ROUNDS)]
    later_s = statistics.median(b for _, b in pairs)
    return {
        "local_ms": round(1000 * statistics.median(a for a, _ in pairs), 2),
        "remote_ms": round(1000 * later_s, 2),
        "remote_to_local": round(statistics.median(b / a for a, b in pairs), 2),
        "first_ms": round(1000 * first_s, 1),
        "first_to_later": round(first_s / later_s, 1),
    }


def _seconds(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with jupyter_gpupool.attach(num_gpus=1, memory_fraction=0.5):
            torch.ones(1, device="cuda").item()
            return {
                make.__name__: measure(make)
                for make in (lstm, word_language_model, transformer_layer, transformer_layer_inference)
            }
    finally:
        torch.set_num_threads(threads)
