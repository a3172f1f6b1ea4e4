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
    specs.EXIT_MOVED: (LeaseState.LOST, "it was moved, and the pool that moved it has ended"),
    specs.EXIT_UNRECORDED: (LeaseState.LOST, "its worker could not write its state file"),
    specs.EXIT_NOT_SHUT_IN: (LeaseState.LOST, "its worker could not be shut in its sandbox"),
    specs.EXIT_NOT_BOUND: (LeaseState.LOST, "its worker could not be put into its control group"),
    specs.EXIT_KERNEL_FAILED: (
        LeaseState.LOST,
        "a kernel of its program failed, and left its worker without the GPU",
    ),
    specs.EXIT_GPU_FAILED: (LeaseState.LOST, "its GPU failed"),
    specs.EXIT_GPU_UNUSABLE: (LeaseState.LOST, "its GPU cannot be used"),
}

#: The signals by which an operator ends its process. The kernel sends SIGKILL for memory, and people send others.
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE, -signal.SIGABRT}


def is_replaced(code: int | None) -> bool:
    """Whether another worker takes the place of one with that exit code: it ended by what it computed.

    The lease is held still, and a new process can use the GPU. Who was killed is not replaced: somebody wanted that.
    """
    return code in _CRASHES or code in (specs.EXIT_KERNEL_FAILED, specs.EXIT_GPU_FAILED)


def end_of(code: int | None) -> tuple[LeaseState, str]:
    """The lease's state and reason for a worker's exit code (a negative signal number; None if unknown)."""
    if code in _ENDS:
        return _ENDS[code]
    if code is None:
        return LeaseState.LOST, "its worker died"
    if -code in set(signal.Signals):
        return LeaseState.LOST, f"its worker was killed by {signal.Signals(-code).name}"
    if code < 0:  # the other signals have no names
        return LeaseState.LOST, f"its worker was killed by signal {-code}"
    return LeaseState.LOST, f"its worker failed with exit code {code}"
