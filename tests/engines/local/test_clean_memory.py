"""A lease's new memory has nothing of another's, although all workers are forked from one process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.core.models import Lease  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402

from .test_engine import attach_spec, granted  # noqa: E402
from .test_parking import Server  # noqa: E402

SLICE_MIB = 300
MARK = 0x5EC12E7


@contextlib.contextmanager
def attached(server: Server, lease: Lease) -> Iterator[None]:
    spec = attach_spec(lease, server.start(lease))
    line = Lifeline(spec)
    session.activate(spec)
    try:
        yield
    finally:
        session.deactivate()
        line.release()
        server.do(server.engine.stop_worker(lease.id))


def whole_slice(mib: int = SLICE_MIB - 50) -> bytes:
    """What a new lease finds where it may take memory: nearly all of its slice, in large and in small pieces."""
    sizes = [256] * 20 + [4096] * 20 + [1 << 16] * 20 + [mib << 20]
    pieces = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    return b"\0".join(piece.cpu().numpy().tobytes() for piece in pieces)


def fill(mib: int) -> torch.Tensor:
    kept = torch.full((mib << 18,), MARK, dtype=torch.int32, device="cuda")
    assert kept[-1].item() == MARK
    return kept


def test_new_memory_has_nothing_of_a_killed_worker(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    try:
        killed, last = granted(memory_mib=SLICE_MIB), granted(memory_mib=SLICE_MIB)
        with attached(server, killed):
            fill(SLICE_MIB - 50)
            os.kill(server.engine._workers.addresses()[killed.id].pid, signal.SIGKILL)
        with attached(server, last):
            assert MARK.to_bytes(4, "little") * 4 not in whole_slice()
    finally:
        server.stop()


def test_new_memory_has_nothing_of_a_lease_that_is_parked_and_resumed(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    """Nor do those that share the arena with it, and the parked lease has its own again."""
    server = Server(tmp_path / "run", park_memory_mib=128)
    try:
        parked, beside, last = (granted(memory_mib=SLICE_MIB) for _ in range(3))
        with attached(server, parked):
            kept = fill(100)
            server.do(server.engine.park_worker(parked))
            server.do(server.engine.resume_worker(parked))
            assert (kept.cpu() == MARK).all()
            server.do(server.engine.park_worker(parked))
        arena = server.engine._parking.arena
        eventually(lambda: arena.free_mib == 128, "its part of the arena is free again")
        with attached(server, beside):
            own = torch.zeros(100 << 18, dtype=torch.int32, device="cuda")
            torch.cuda.synchronize()
            server.do(server.engine.park_worker(beside))
            server.do(server.engine.resume_worker(beside))
            assert not own.cpu().any()
            assert MARK.to_bytes(4, "little") * 4 not in whole_slice(SLICE_MIB - 150)
        with attached(server, last):
            assert MARK.to_bytes(4, "little") * 4 not in whole_slice()
    finally:
        server.stop()


def test_new_memory_has_nothing_of_leases_before(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    try:
        *before, last = [granted(memory_mib=SLICE_MIB) for _ in range(3)]
        for lease in before:
            with attached(server, lease):
                fill(SLICE_MIB - 50)
        with attached(server, last):
            seen = whole_slice()
        words = [MARK.to_bytes(4, "little") * 4, *(lease.id.encode() for lease in before)]
        assert not [word for word in words if word in seen]
    finally:
        server.stop()
