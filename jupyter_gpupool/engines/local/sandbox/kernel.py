"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def syscall(number: int, *arguments: Any) -> int:
    """Call the kernel, and return what it returns. Raises OSError.

    An int is passed as a whole register: without a type, ctypes would pass 32 bits.
    """
    ctypes.set_errno(0)
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *given))
    if result < 0:
        raise _error()
    return result


def prctl(option: int, second: int = 0, third: Any = 0) -> int:
    """Change or read a property of this process. Raises OSError."""
    ctypes.set_errno(0)
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in (second, third, 0, 0)]
    result = int(_libc.prctl(ctypes.c_int(option), *given))
    if result < 0:
        raise _error()
    return result


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
