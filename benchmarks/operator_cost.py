"""The cost of an operator for the client, and the operators per second of the worker."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import jupyter_gpupool

GOALS = {"async_us": ("<=", 20.0), "operators_per_s": (">=", 60_000)}

OPERATORS = 5_000
ROUNDS = 9


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with jupyter_gpupool.attach(num_gpus=1, partial=0.5):
            x = torch.ones(4, 4, device="cuda")
            w = torch.ones(4, 4, device="cuda", requires_grad=True)
            client, both = _cost(lambda: x + x)
            figures: dict[str, Any] = {
                "async_us": client,
                "operators_per_s": round(1e6 / both),
                "by_kind_us": {
                    "add (new result)": client,
                    "mul_ (in place, a float)": _cost(lambda: x.mul_(1.0))[0],
                    "t (a view)": _cost(x.t)[0],
                    "add with autograd": _cost(lambda: w + x)[0],
                },
                "local_add_us": _cost_local(),
                "item_us": _synchronous(x),
            }
    finally:
        torch.set_num_threads(threads)
    return figures


def _cost(operator: Callable[[], Any]) -> tuple[float, float]:
    """Return (µs per operator until the client continues, µs until the worker is done too): medians of rounds."""
    client, both = [], []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        for _ in range(OPERATORS):
            operator()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        client.append((issued - began) / OPERATORS * 1e6)
        both.append((time.perf_counter() - began) / OPERATORS * 1e6)
    return round(statistics.median(client[1:]), 2), round(statistics.median(both[1:]), 2)


def _cost_local() -> float:
    x = torch.ones(4, 4)
    rounds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        for _ in range(OPERATORS):
            x + x
        rounds.append((time.perf_counter() - began) / OPERATORS * 1e6)
    return round(statistics.median(rounds[1:]), 2)


def _synchronous(x: torch.Tensor) -> float:
    """Return the µs for one operator and the reply with its value."""
    cell = x[0, 0]
    rounds = []
    for _ in range(1000):
        began = time.perf_counter()
        cell.item()
        rounds.append((time.perf_counter() - began) * 1e6)
    return round(statistics.median(rounds), 1)
