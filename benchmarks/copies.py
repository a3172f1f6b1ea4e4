"""Operations that move bytes or wait: copies to the slice and back, one element of a tensor, a single operator.

Each is measured beside a bare connection of the same kind, plain or TLS 1.3, in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.protocol.sizes import host_bytes

from .echo import MOST_BYTES, Echo
from .far_worker import certificate, far_worker

GOALS = {
    "to_slice_to_socket": (">=", 0.9),
    "to_slice_to_tls_socket": (">=", 0.9),
    "one_element_bytes": ("<=", 1024),
    "lone_operator_above_socket_us": ("<=", 150),
}
MIB = 1 << 20
SIZE = MOST_BYTES
ROUNDS = 7


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Echo() as echo, far_worker(linked=False):
            figures = {**_copies(echo), **_lone(echo), **_overlap()}
        with certificate() as secured, Echo(secured) as echo, far_worker(linked=False, secured=secured):
            figures |= _copies(echo, "tls_")
            figures["tls_lone_operator_above_socket_us"] = _lone(echo)["lone_operator_above_socket_us"]
        with far_worker() as link:
            large = torch.zeros(1 << 28, device="cuda")  # 1 GiB
            torch.cuda.synchronize()
            link.measure()
            large[123_456_789].item()
            traffic = link.measure()
            figures["one_element_bytes"] = traffic.bytes_up + traffic.bytes_down
    finally:
        torch.set_num_threads(threads)
    return figures


def _median(function: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return seconds."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _copies(echo: Echo, kind: str = "") -> dict[str, Any]:
    """Copy into memory that exists already, at both ends."""
    d = attachment.dispatcher()
    host = torch.zeros(SIZE, dtype=torch.uint8)
    there = torch.zeros(SIZE, dtype=torch.uint8, device="cuda")
    ratios, rates = [], []

    def up() -> None:
        there.copy_(host)
        d.stream.wait()

    for _ in range(ROUNDS):
        ours, socket_s = _median(up, 1), _median(lambda: echo.up(host_bytes(host)), 1)
        ratios.append(socket_s / ours)
        rates.append(SIZE / ours / 1e9)
    back = _median(lambda: host.copy_(there), 3)
    return {
        f"{kind}to_slice_gb_per_s": round(statistics.median(rates), 2),
        f"to_slice_to_{kind}socket": round(statistics.median(ratios), 3),
        f"{kind}from_slice_gb_per_s": round(SIZE / back / 1e9, 2),
    }


def _lone(echo: Echo) -> dict[str, Any]:
    x = torch.zeros((), device="cuda")
    ours = _median(lambda: x.item(), 500) * 1e6
    bare = _median(echo.ping, 500) * 1e6
    return {
        "lone_operator_us": round(ours, 1),
        "socket_round_trip_us": round(bare, 1),
        "lone_operator_above_socket_us": round(ours - bare, 1),
    }


def _overlap() -> dict[str, Any]:
    """Copy while a computation runs: how long both take, and how long the program is blocked."""
    host = torch.zeros(64 * MIB, dtype=torch.uint8)
    there = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    a = torch.randn(1500, 1500, device="cuda")

    def compute() -> None:
        a @ a

    def copy() -> None:
        there.copy_(host, non_blocking=True)

    def both() -> None:
        compute()
        copy()

    def timed(function: Callable[[], None]) -> tuple[float, float]:
        """Return seconds until the program continues, and until everything is done."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        held = time.perf_counter() - began
        torch.cuda.synchronize()
        return held, time.perf_counter() - began

    rounds = [(timed(compute)[1], timed(copy)[1], *timed(both)) for _ in range(ROUNDS + 1)][1:]
    compute_s, copy_s, held_s, both_s = (statistics.median(v) for v in zip(*rounds))
    return {
        "compute_ms": round(1e3 * compute_s, 1),
        "copy_ms": round(1e3 * copy_s, 1),
        "copy_while_computing_ms": round(1e3 * both_s, 1),
        "copy_while_computing_holds_up_ms": round(1e3 * held_s, 1),
    }
