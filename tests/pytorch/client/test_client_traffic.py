"""What ranks exchange passes no client: every byte on every TCP connection of the programs is counted."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from .two_ranks import digits, elements, run  # noqa: E402

#: tcpi_bytes_acked and tcpi_bytes_received of Linux's struct tcp_info
_BYTES = struct.Struct("=QQ")
_BYTES_AT = 120


def passed() -> int:
    """The bytes that this process has sent and received on all its TCP connections that are open."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=int(entry.name)) as sock:
                try:
                    if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += sum(_BYTES.unpack_from(info, _BYTES_AT))
                finally:
                    sock.detach()
        except OSError:
            continue  # it was closed meanwhile, or listens
    return total


def counted(step: Callable[[], object]) -> int:
    """The bytes that pass while ``step`` runs. Both ranks begin and end together."""
    torch.cuda.synchronize()
    dist.barrier()
    before = passed()
    step()
    torch.cuda.synchronize()
    dist.barrier()
    return passed() - before


def traffic(device: str, rank: int) -> dict[str, Any]:
    """Bytes that pass this client with a tensor on its way to the host, a message, and a step with its gradients."""
    x = elements((1 << 18,), torch.float32, rank).to(device)
    got = torch.zeros_like(x)

    def exchange() -> None:
        work = dist.irecv(got, 1 - rank)
        dist.isend(x, 1 - rank).wait()
        work.wait()

    network = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).to(device)
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batch = elements((4, 512), torch.float32, rank).to(device)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    step()  # the first one defines its operators
    step()
    exchange()
    return {
        "to the host": counted(x.cpu),
        "message": counted(exchange),
        "step": counted(step),
        "gradients": sum(p.numel() * p.element_size() for p in model.parameters()),
        "got": digits(got[:8]),
    }


def test_neither_messages_nor_gradients_pass_a_client(start_worker: Callable, tmp_path: Path) -> None:
    found = run(start_worker().spec, tmp_path / "store", {"traffic": traffic})
    for rank in range(2):
        there = found[rank]["traffic"]
        assert there["to the host"] > 1 << 20, "what passes is counted"
        assert there["message"] < 10_000, "of 1 MiB"
        assert there["gradients"] > 4 << 20
        assert there["step"] < there["gradients"] / 50, "commands alone"
        assert there["got"] == digits(elements((1 << 18,), torch.float32, 1 - rank)[:8])
