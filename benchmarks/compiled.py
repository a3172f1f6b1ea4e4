"""``torch.compile(…, backend="gpupool")``: 40 tiny layers, and ResNet-50 for one image, beside the local machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .far_worker import far_worker
from .networks import ResNet50

GOALS = {"tiny_compiled_to_local": ("<=", 1.0), "resnet50_share_of_local": (">=", 0.95)}
ROUNDS = 9


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with far_worker():
            return {**_tiny(), **_resnet()}
    finally:
        torch.set_num_threads(threads)


def _tiny() -> dict[str, Any]:
    """40 layers that take less time to compute than to call."""
    torch.manual_seed(1)
    local = nn.Sequential(*[m for _ in range(40) for m in (nn.Linear(16, 16), nn.ReLU())])
    remote = copy.deepcopy(local).to("cuda")
    fast = torch.compile(remote, backend="gpupool")
    x = torch.randn(8, 16)
    there = x.to("cuda")

    def training(model: Callable, inputs: torch.Tensor, owner: nn.Module) -> None:
        model(inputs).sum().backward()
        owner.zero_grad()

    with torch.no_grad():
        infer = _ratios(lambda: local(x), lambda: fast(there), 200)
        eager = _ratios(lambda: local(x), lambda: remote(there), 100)
    train = _ratios(lambda: training(local, x, local), lambda: training(fast, there, remote), 60)
    return {
        "tiny_local_us": infer[0],
        "tiny_compiled_us": infer[1],
        "tiny_compiled_to_local": infer[2],
        "tiny_eager_to_local": eager[2],
        "tiny_training_compiled_to_local": train[2],
    }


def _resnet() -> dict[str, Any]:
    """Copy the image from the host and the class back, each time."""
    torch.manual_seed(1)
    local = ResNet50().eval()
    remote = copy.deepcopy(local).to("cuda")
    fast = torch.compile(remote, backend="gpupool")
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        eager = _ratios(
            lambda: local(image).argmax().item(), lambda: remote(image.to("cuda")).argmax().item(), 3
        )
        compiled = _ratios(
            lambda: local(image).argmax().item(), lambda: fast(image.to("cuda")).argmax().item(), 3
        )
    return {
        "resnet50_local_ms": round(compiled[0] / 1e3, 2),
        "resnet50_compiled_ms": round(compiled[1] / 1e3, 2),
        "resnet50_share_of_local": round(1 / compiled[2], 3),
        "resnet50_eager_share_of_local": round(1 / eager[2], 3),
    }


def _ratios(local: Callable[[], Any], remote: Callable[[], Any], times: int) -> tuple[float, float, float]:
    """Return (local µs, remote µs, remote ÷ local): medians of alternating rounds. Each round ends with a wait."""

    def microseconds(function: Callable[[], Any], wait: Callable[[], Any]) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(times):
            function()
        wait()
        return (time.perf_counter() - began) / times * 1e6

    pairs = [
        (microseconds(local, lambda: None), microseconds(remote, torch.cuda.synchronize))
        for _ in range(ROUNDS + 1)
    ][1:]
    return (
        round(statistics.median(a for a, _ in pairs), 1),
        round(statistics.median(b for _, b in pairs), 1),
        round(statistics.median(b / a for a, b in pairs), 3),
    )
