"""A kernel that fails takes the GPU from its worker's process: what the program learns, and how the worker ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402
from jupyter_gpupool.transport.handshake import Refused  # noqa: E402
from jupyter_gpupool.transport.specs import (  # noqa: E402
    EXIT_GPU_FAILED,
    EXIT_GPU_UNUSABLE,
    EXIT_KERNEL_FAILED,
    WorkerSpec,
)


def serve(listener: socket.socket, spec: WorkerSpec) -> None:
    from jupyter_gpupool.pytorch.worker import worker
    from tests.support.failing_gpus import install

    install()
    os._exit(worker.serve(spec, listener, lambda usage: None))


def serve_none(listener: socket.socket, spec: WorkerSpec) -> None:
    """A worker whose GPU is not there any more."""
    from jupyter_gpupool.pytorch.worker import worker
    from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice

    def fails(self: Any, *args: Any) -> None:
        raise RuntimeError("CUDA error: no CUDA-capable device is detected\nand more lines")

    EmulatedDevice.__init__ = fails  # type: ignore[method-assign]
    os._exit(worker.serve(spec, listener, lambda usage: None))


@pytest.mark.parametrize(
    ("function", "reason", "code"),
    [
        ("entr", "an index or an assertion of a kernel was out of bounds", EXIT_KERNEL_FAILED),
        ("erfcx", "the GPU's memory has an uncorrectable error", EXIT_GPU_FAILED),
    ],
)
def test_the_program_learns_what_was_under_way(
    start_worker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    reason: str,
    code: int,
) -> None:
    monkeypatch.setattr(attachment, "REPLACED_WITHIN_S", 0.5)  # nobody starts another one here
    worker = start_worker(serve=serve)
    session.activate(worker.spec)
    try:
        x = torch.ones(3, device="gpupool:0")
        kept = torch.ones(3)
        with pytest.raises(RuntimeError) as found:
            y = x * 2
            getattr(torch.special, function)(y).sum().item()
        message = str(found.value)
        assert reason in message and f"aten::special_{function}" in message and "aten::mul" in message
        assert "test_device_failures.py" in message and "y = x * 2" in message
        assert worker.exit_code() == code
        with pytest.raises(RuntimeError, match="is gone .*Request GPUs again"):
            (x + 1).sum().item()
        assert kept.sum().item() == 3
    finally:
        session.deactivate()


def test_a_gpu_that_is_not_there_ends_the_lease(start_worker: Callable[..., Any]) -> None:
    worker = start_worker(serve=serve_none)
    session.activate(worker.spec)
    try:
        with pytest.raises(
            Refused, match="^the GPU cannot be used: CUDA error: no CUDA-capable device is detected$"
        ):
            torch.ones(3, device="gpupool:0").sum().item()
        assert worker.exit_code() == EXIT_GPU_UNUSABLE
    finally:
        session.deactivate()
