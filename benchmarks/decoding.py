"""Decoding with a growing cache: every step has shapes that no earlier step had."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.dispatch.dispatcher import Dispatcher

from .far_worker import far_worker
from .networks import Decoder

GOALS = {"new_shapes_share": ("<=", 0.05)}
TOKENS = 32
ROUNDS = 5


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with far_worker():
            torch.manual_seed(1)
            local, remote = Decoder(), Decoder().to("cuda")
            remote.load_state_dict(local.state_dict())
            return _compare(local, remote)
    finally:
        torch.set_num_threads(threads)


def _compare(local: Decoder, remote: Decoder) -> dict[str, Any]:
    d = attachment.dispatcher()
    spent = [0.0]
    define = Dispatcher._define

    def timed(self: Dispatcher, *args: Any) -> Any:
        began = time.perf_counter()
        try:
            return define(self, *args)
        finally:
            spent[0] += time.perf_counter() - began

    Dispatcher._define = timed  # type: ignore[method-assign]
    rounds = []
    try:
        for k in range(ROUNDS + 1):
            # every round uses new positions
            prompt = torch.randint(0, 50257, (1, 16 + k * TOKENS))
            began = time.perf_counter()
            expected = local.decode(prompt, TOKENS)
            local_s = time.perf_counter() - began
            spent[0], misses = 0.0, d.misses
            there = prompt.to("cuda")
            began = time.perf_counter()
            found = remote.decode(there, TOKENS)
            issued_s = time.perf_counter() - began
            found = found.cpu()
            remote_s = time.perf_counter() - began
            same = (expected == found).float().mean().item()
            rounds.append((local_s, remote_s, issued_s, spent[0], (d.misses - misses) / TOKENS, same))
    finally:
        Dispatcher._define = define  # type: ignore[method-assign]
    local_s, remote_s, issued_s, defining_s, missed, same = (statistics.median(v) for v in zip(*rounds[1:]))
    return {
        "local_ms_per_token": round(1e3 * local_s / TOKENS, 2),
        "remote_ms_per_token": round(1e3 * remote_s / TOKENS, 2),
        "remote_to_local": round(statistics.median(r / a for a, r, *_ in rounds[1:]), 3),
        "client_ms_per_token": round(1e3 * issued_s / TOKENS, 2),
        "new_shapes_per_token": round(missed, 1),
        "new_shapes_ms_per_token": round(1e3 * defining_s / TOKENS, 2),
        "new_shapes_share": round(defining_s / remote_s, 3),
        "tokens_that_agree": same,
    }
