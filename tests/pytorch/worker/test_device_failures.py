"""A kernel that fails takes the GPU from its worker's process: what the program learns, and how the lease ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport.specs import EXIT_GPU_FAILED, EXIT_KERNEL_FAILED, WorkerSpec  # noqa: E402

ERRORS = {
    "aten::special_entr": "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`",
    "aten::special_erfcx": "CUDA error: uncorrectable ECC error encountered",
}


def serve(listener: socket.socket, spec: WorkerSpec) -> None:
    """A worker whose emulated GPU fails at two operators as a real one does: from then on, everything fails."""
    from jupyter_gpupool.pytorch.worker import worker
    from jupyter_gpupool.pytorch.worker.device_errors import device_failure
    from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice

    whole, broken = EmulatedDevice.kernel, []

    def kernel(self: Any, op: Any, default: Any) -> Any:
        run = whole(self, op, default)

        def fails(*args: Any, **kwargs: Any) -> Any:
            text = ERRORS.get(op._schema.name)
            if text is not None:
                broken.append(text)
            if broken:
                raise RuntimeError(broken[0])
            return run(*args, **kwargs)

        return fails

    EmulatedDevice.kernel = kernel  # type: ignore[method-assign]
    EmulatedDevice.failure = lambda self, error: device_failure(error)  # type: ignore[method-assign]
    os._exit(worker.serve(spec, listener, lambda usage: None))


@pytest.mark.parametrize(
    ("function", "reason", "code"),
    [
        ("entr", "an index or an assertion of a kernel was out of bounds", EXIT_KERNEL_FAILED),
        ("erfcx", "the GPU's memory has an uncorrectable error", EXIT_GPU_FAILED),
    ],
)
def test_the_program_learns_what_was_under_way(
    start_worker: Callable[..., Any], function: str, reason: str, code: int
) -> None:
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
        with pytest.raises(RuntimeError, match="is gone"):
            (x + 1).sum().item()
        assert kept.sum().item() == 3
    finally:
        session.deactivate()
