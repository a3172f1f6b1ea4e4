"""The layer of namespaces: a worker is alone in one of users, of networks and of System V's memory and messages.

In a namespace of users of its own it has no rights over the processes outside, though they are the same user's. In one
of networks there is nothing to connect to; connections that it is handed go on.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from . import kernel

_NEW_USERS, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
#: The number of unshare by machine.
_UNSHARE = {"x86_64": 272, "aarch64": 97}


def missing(machine: str) -> str:
    """Why this kernel lacks the layer; empty if it may have it, which only trying shows."""
    return "" if machine in _UNSHARE else f"namespaces cannot be made on {machine}"


def enter(machine: str) -> None:
    """Leave the namespaces of this process's parent, for good; it stays the same user. Raises OSError."""
    _make_with_users(machine, _NEW_NETWORK | _NEW_IPC)


def make(machine: str, kinds: int) -> None:
    """Leave the namespaces of these kinds, and if that takes a right that this process lacks, that of users.

    Raises OSError.
    """
    try:
        kernel.syscall(_UNSHARE[machine], kinds)
    except PermissionError:
        _make_with_users(machine, kinds)


def _make_with_users(machine: str, kinds: int) -> None:
    user, group = os.geteuid(), os.getegid()
    try:
        kernel.syscall(_UNSHARE[machine], _NEW_USERS | kinds)
    except OSError as e:
        if e.errno == errno.ENOSPC:  # in the words of the kernel, "no space left on device"
            why = "no more of them may be made here, see /proc/sys/user/max_user_namespaces"
            raise OSError(e.errno, why) from None
        raise
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(line)
