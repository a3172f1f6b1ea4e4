"""What the end of a worker means for its lease."""

from __future__ import annotations

import signal

from ..pool.models import LeaseState
from ..remote import specs
from .zygote import EXIT_UNRECORDED

#: How each exit code of a worker ends its lease.
_ENDS = {
    specs.EXIT_RELEASED: (LeaseState.RELEASED, "released by its holder"),
    specs.EXIT_HOLDER_LOST: (LeaseState.RELEASED, "its holder went away"),
    specs.EXIT_NEVER_ATTACHED: (LeaseState.EXPIRED, "nobody attached to it"),
    specs.EXIT_FENCED: (LeaseState.EXPIRED, "nothing was heard of its holder"),
    specs.EXIT_STOPPED: (LeaseState.RELEASED, "ended by the pool"),
    EXIT_UNRECORDED: (LeaseState.LOST, "its worker could not write its state file"),
}


def end_of(code: int | None) -> tuple[LeaseState, str]:
    """What a worker's exit code (minus a signal's number; None if unknown) means for its lease."""
    if code in _ENDS:
        return _ENDS[code]
    if code is None:
        return LeaseState.LOST, "its worker died"
    if code < 0:
        return LeaseState.LOST, f"its worker was killed by {signal.Signals(-code).name}"
    return LeaseState.LOST, f"its worker failed with exit code {code}"
