"""Every transition of a lease, as data: from which state to which, by which calls of the Manager, and why.

The stateful tests check each change of the :class:`~.manager.Manager` against this table, and the page
docs/explanation/life-of-a-lease.md has the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from jupyter_gpupool.core.models import LeaseState


@dataclass(frozen=True)
class Transition:
    """``before`` None: the lease is new. ``calls``: the methods of the Manager that may make this transition."""

    before: LeaseState | None
    after: LeaseState
    calls: frozenset[str]
    cause: str


#: The calls that may free memory, raise a limit or skip a silent request, and then grant what waits.
_GRANTING = frozenset(
    {
        "administer",
        "drain",
        "move_failed",
        "moved",
        "park",
        "recover",
        "release",
        "request",
        "resize",
        "resume_failed",
        "set_servers",
        "tick",
        "wake",
        "worker_exited",
        "worker_failed",
    }
)

TRANSITIONS: tuple[Transition, ...] = (
    Transition(None, LeaseState.QUEUED, frozenset({"request"}), "a request that is possible, but not now"),
    Transition(
        None,
        LeaseState.GRANTED,
        frozenset({"request"}),
        "a request that fits now; internally it is queued and granted in one transaction",
    ),
    Transition(
        LeaseState.QUEUED, LeaseState.GRANTED, _GRANTING, "enough is free, and it is the request's turn"
    ),
    Transition(
        LeaseState.QUEUED,
        LeaseState.CANCELLED,
        frozenset({"release", "tick"}),
        "its owner withdrew it, or it sent no heartbeat within its TTL",
    ),
    Transition(
        LeaseState.GRANTED,
        LeaseState.ACTIVE,
        frozenset({"worker_started", "recover"}),
        "the worker listens",
    ),
    Transition(
        LeaseState.GRANTED,
        LeaseState.RELEASED,
        frozenset({"release", "worker_exited"}),
        "its owner or an administrator released it",
    ),
    Transition(
        LeaseState.GRANTED,
        LeaseState.EXPIRED,
        frozenset({"tick", "worker_exited"}),
        "no worker within the attach timeout, no heartbeat within the TTL, or its time is over",
    ),
    Transition(
        LeaseState.GRANTED,
        LeaseState.LOST,
        frozenset({"worker_failed", "worker_exited"}),
        "the worker could not be started, or it died",
    ),
    Transition(
        LeaseState.ACTIVE,
        LeaseState.RELEASED,
        frozenset({"release", "tick", "worker_exited"}),
        "its owner or an administrator released it, its holder ended, "
        "or it was idle for longer than its namespace allows",
    ),
    Transition(
        LeaseState.ACTIVE,
        LeaseState.EXPIRED,
        frozenset({"tick", "worker_exited"}),
        "no heartbeat within `resume_s`, nobody attached, or its time is over",
    ),
    Transition(
        LeaseState.ACTIVE,
        LeaseState.LOST,
        frozenset({"recover", "resume_failed", "worker_exited"}),
        "the worker died, the GPU server was lost, the worker did not outlive a restart of the pool, "
        "or its state could not be brought back",
    ),
    Transition(
        LeaseState.ACTIVE,
        LeaseState.PARKED,
        frozenset({"park", "recover"}),
        "it was idle, somebody waited for its GPUs, and its worker has moved its state to host memory",
    ),
    Transition(
        LeaseState.PARKED,
        LeaseState.ACTIVE,
        _GRANTING | {"moved"},
        "its program needs its GPUs, and there is room, or it has moved to another server",
    ),
    Transition(
        LeaseState.PARKED,
        LeaseState.RELEASED,
        frozenset({"release", "tick", "worker_exited"}),
        "as from ACTIVE",
    ),
    Transition(
        LeaseState.PARKED,
        LeaseState.EXPIRED,
        frozenset({"tick", "worker_exited"}),
        "as from ACTIVE",
    ),
    Transition(
        LeaseState.PARKED,
        LeaseState.LOST,
        frozenset({"recover", "worker_exited"}),
        "the worker died, or it did not outlive a restart of the pool",
    ),
)


def find_transition(before: LeaseState | None, after: LeaseState) -> Transition | None:
    """The transition between two states; None if there is none."""
    return next((one for one in TRANSITIONS if (one.before, one.after) == (before, after)), None)
