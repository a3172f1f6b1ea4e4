"""Emulated GPUs that fail at some operators as real ones do, in workers that a pool starts with :data:`ENVIRONMENT`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

#: What a worker dies of at these operators: an error of CUDA, after which every call fails, or a signal.
FAILURES: dict[str, str | signal.Signals] = {
    "aten::special_entr": "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`",
    "aten::special_erfcx": "CUDA error: uncorrectable ECC error encountered",
    "aten::special_bessel_j0": signal.SIGSEGV,
}

#: With this, the processes that fork workers call :func:`install`, see sitecustomize.py.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    )
}


def install() -> None:
    """Let the emulated GPUs of this process and its forks fail at those operators."""
    from jupyter_gpupool.pytorch.worker.device_errors import device_failure
    from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice

    whole, broken = EmulatedDevice.kernel, []

    def kernel(self: Any, op: Any, default: Any) -> Any:
        run = whole(self, op, default)
        failure = FAILURES.get(op._schema.name) if op is not None else None

        def fails(*args: Any, **kwargs: Any) -> Any:
            if isinstance(failure, signal.Signals):
                signal.raise_signal(failure)
            elif failure is not None:
                broken.append(failure)
            if broken:
                raise RuntimeError(broken[0])
            return run(*args, **kwargs)

        return fails

    EmulatedDevice.kernel = kernel  # type: ignore[method-assign]
    EmulatedDevice.failure = lambda self, error: device_failure(error)  # type: ignore[method-assign]
