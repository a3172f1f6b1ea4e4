"""The layer of privileges: a worker keeps no capability, and no program that it starts gains one."""

from __future__ import annotations

import contextlib
import ctypes

from . import kernel

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39
_PR_CAP_AMBIENT, _CLEAR_ALL = 47, 4
#: The third version of capset's structures: two sets of 32 capabilities.
_VERSION = 0x20080522
_MOST_CAPABILITIES = 64
#: The number of capset by machine.
_CAPSET = {"x86_64": 126, "aarch64": 91}


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def missing() -> str:
    """Why this kernel lacks the layer; empty if it has it."""
    try:
        kernel.prctl(_PR_GET_NO_NEW_PRIVS)
    except OSError as e:
        return f"the kernel has no no_new_privs ({e.strerror})"
    return ""


def no_new() -> None:
    """Let no program that this process starts gain privileges; the other layers need that. Raises OSError."""
    kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def enter(machine: str) -> None:
    """Give every privilege up, for good. Raises OSError."""
    no_new()
    with contextlib.suppress(OSError):  # a kernel before 4.3 has no ambient ones
        kernel.prctl(_PR_CAP_AMBIENT, _CLEAR_ALL)
    with contextlib.suppress(OSError):  # the first that does not exist, or this process had none to drop
        for capability in range(_MOST_CAPABILITIES):
            kernel.prctl(_PR_CAPBSET_DROP, capability)
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()
    kernel.syscall(_CAPSET[machine], ctypes.byref(header), ctypes.byref(sets))
