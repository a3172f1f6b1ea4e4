"""What a slice refuses of JAX's own tests: by what a test that fails of it says, and why."""

from __future__ import annotations

import re

#: A part of the failed test's message → the reason.
BY_MESSAGE: dict[str, str] = {
    r"UNIMPLEMENTED: (an output of type u?int[24] is|arrays of PJRT's type \d+ are) not supported": (
        "types of less than a byte are not on slices yet"
    ),
    r"UNIMPLEMENTED: an array of a slice has no address": "an array of a slice has no address in this process",
    r"UNIMPLEMENTED: an array that is not in row-major order": "layouts that are not row-major are not on slices yet",
    r"UNIMPLEMENTED: the custom call \S+ is not supported": (
        "the worker calls only functions whose arrays it can check"
    ),
    r"UNIMPLEMENTED: a compiled program of a slice stays": "a worker takes machine code from nobody",
}


def reason(why: str) -> str:
    """Return why a test that the CPU passes may fail on a slice with that message; empty if it may not."""
    return next((said for pattern, said in BY_MESSAGE.items() if re.search(pattern, why)), "")
