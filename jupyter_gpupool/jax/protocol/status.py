"""The codes of errors, which are those of PJRT, and the exception that carries one."""

from __future__ import annotations

CANCELLED = 1
INVALID_ARGUMENT = 3
NOT_FOUND = 5
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14

#: The codes by the names with which XLA's messages begin.
CODES = {
    **{"CANCELLED": 1, "UNKNOWN": 2, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5},
    **{"ALREADY_EXISTS": 6, "PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "FAILED_PRECONDITION": 9},
    **{"ABORTED": 10, "OUT_OF_RANGE": 11, "UNIMPLEMENTED": 12, "INTERNAL": 13, "UNAVAILABLE": 14},
    **{"DATA_LOSS": 15, "UNAUTHENTICATED": 16},
}


class StatusError(Exception):
    """An error with a code, which JAX shows as its JaxRuntimeError.

    ``origin``: the id of the first array that is missing for it, see :mod:`.commands`; 0 if that is not known.
    """

    def __init__(self, code: int, message: str, origin: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.origin = origin


def status_of(text: str) -> StatusError:
    """Return the error that XLA's message tells: ``"CODE: message"``, and INTERNAL without a code."""
    name, colon, message = text.partition(": ")
    if colon and name in CODES:
        return StatusError(CODES[name], message)
    return StatusError(INTERNAL, text)
