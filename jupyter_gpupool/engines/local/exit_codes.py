"""The state and the reason with which a lease ends when its worker exits."""

from __future__ import annotations

import signal

from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.transport import specs

#: How each exit code of a worker ends its lease.
_ENDS = {
    specs.EXIT_RELEASED: (LeaseState.RELEASED, "released by its holder"),
    specs.EXIT_HOLDER_LOST: (LeaseState.RELEASED, "its holder went away"),
    specs.EXIT_NEVER_ATTACHED: (LeaseState.EXPIRED, "nobody attached to it"),
    specs.EXIT_FENCED: (LeaseState.EXPIRED, "nothing was heard of its holder"),
    specs.EXIT_STOPPED: (LeaseState.RELEASED, "ended by the pool"),
    specs.EXIT_UNRECORDED: (LeaseState.LOST, "its worker could not write its state file"),
    specs.EXIT_KERNEL_FAILED: (
        LeaseState.LOST,
        "a kernel of its program failed, and left its worker without the GPU",
    ),
    specs.EXIT_GPU_FAILED: (LeaseState.LOST, "its GPU failed"),
}


def end_of(code: int | None) -> tuple[LeaseState, str]:
    """The lease's state and reason for a worker's exit code (a negative signal number; None if unknown)."""
    if code in _ENDS:
        return _ENDS[code]
    if code is None:
        return LeaseState.LOST, "its worker died"
    if code < 0:
        return LeaseState.LOST, f"its worker was killed by {signal.Signals(-code).name}"
    return LeaseState.LOST, f"its worker failed with exit code {code}"
