"""A lease's new memory has nothing of another's, although all workers are forked from one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

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


def test_new_memory_has_nothing_of_leases_before(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    try:
        *before, last = [granted(memory_mib=SLICE_MIB) for _ in range(3)]
        for lease in before:
            with attached(server, lease):
                kept = torch.full(((SLICE_MIB - 50) << 18,), MARK, dtype=torch.int32, device="cuda")
                assert kept[-1].item() == MARK
        with attached(server, last):
            sizes = [256] * 20 + [4096] * 20 + [1 << 16] * 20 + [200 << 20]
            pieces = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
            seen = b"\0".join(piece.cpu().numpy().tobytes() for piece in pieces)
        words = [MARK.to_bytes(4, "little") * 4, *(lease.id.encode() for lease in before)]
        assert not [word for word in words if word in seen]
    finally:
        server.stop()
