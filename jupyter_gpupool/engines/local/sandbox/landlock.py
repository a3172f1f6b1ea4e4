"""The layer of files: what a worker may open and connect to, by Landlock of version 3 and later (Linux 6.2).

Former versions let a file be emptied by who cannot write to it, every file of the pool included.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from . import kernel, privileges

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_VERSION_FLAG = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_REG = 1 << 7, 1 << 8
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
#: Rights that a rule about a file, which is not a directory, may have.
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_OLDEST = 3
#: How many rights of files each version has.
_RIGHTS = {3: 15, 4: 15}
_NEWEST_RIGHTS = 16
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1


class Access(Enum):
    """What a worker may do with a path and all that is beneath it.

    In its own directory it can make neither links nor sockets nor devices, so that it cannot mislead who reads there.
    """

    READ = _READ_FILE | _READ_DIR
    RUN = _READ_FILE | _READ_DIR | _EXECUTE
    DEVICE = _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
    OWN = (
        _READ_FILE
        | _READ_DIR
        | _WRITE_FILE
        | _TRUNCATE
        | _MAKE_REG
        | _MAKE_DIR
        | _REMOVE_FILE
        | _REMOVE_DIR
        | _REFER
    )


@dataclass(frozen=True)
class Rule:
    """A path that a worker may use."""

    path: str
    access: Access


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def handled(version: int) -> tuple[int, int, int]:
    """Return what a ruleset of that version governs: rights of files, of TCP ports, and scopes, all of which it has."""
    files = (1 << _RIGHTS.get(version, _NEWEST_RIGHTS)) - 1
    return (
        files,
        _BIND_TCP | _CONNECT_TCP if version >= 4 else 0,
        _ABSTRACT_SOCKETS | _SIGNALS if version >= 6 else 0,
    )


def allowed(access: Access, is_directory: bool, version: int) -> int:
    """Return the rights of a rule, for a path of that kind."""
    rights = access.value & handled(version)[0]
    return rights if is_directory else rights & _OF_FILES


def version() -> int:
    """Return the version of the kernel's Landlock. Raises OSError if it has none, or does not let this process."""
    return kernel.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)


def missing() -> str:
    """Why this kernel lacks the layer; empty if it has it."""
    try:
        known = version()
    except OSError as e:
        return f"the kernel has no Landlock, or does not let this process use it ({e.strerror})"
    if known < _OLDEST:
        return "this kernel's Landlock (before Linux 6.2) does not protect files from being emptied"
    return ""


def enter(rules: Iterable[Rule]) -> None:
    """Close everything to this thread, and to those that it starts, but what the rules name. Raises OSError.

    A path that does not exist is left out.
    """
    privileges.no_new()
    known = version()
    attributes = _Ruleset(*handled(known))
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    ruleset = kernel.syscall(_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    try:
        for rule in rules:
            _add(ruleset, rule, known)
        kernel.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _add(ruleset: int, rule: Rule, known: int) -> None:
    try:
        parent = os.open(Path(rule.path), os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        rights = allowed(rule.access, stat.S_ISDIR(os.fstat(parent).st_mode), known)
        beneath = _PathBeneath(rights, parent)
        kernel.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(beneath), 0)
    finally:
        os.close(parent)
