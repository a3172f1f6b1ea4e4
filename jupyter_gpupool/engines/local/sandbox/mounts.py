"""The layer of mounts: a worker sees the paths that it needs, in a root of its own, and not the names of others.

The root is an empty file system in memory. What :mod:`.worker_paths` names is mounted there at the same paths, symbolic
links that lead there are made again, and the former root is let go.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import kernel, namespaces
from .system_calls import NUMBERS

_NEW_MOUNTS = 0x00020000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE = 0x1, 0x2, 0x4, 0x20, 0x1000, 0x4000
_PRIVATE = 1 << 18
_DETACH = 2
#: Of open_tree and move_mount: paths begin in the working directory; a copy of the mount; the mount of a descriptor.
_HERE, _CLONE, _OF_DESCRIPTOR = -100, 1, 4
#: What is in the root itself: folders, empty files and links.
_OPTIONS = b"size=1m,nr_inodes=8k,mode=755"
#: The most links in a row, as the kernel has it.
_MAX_LINKS = 40


@dataclass(frozen=True)
class View:
    """What is to be seen: whether each mounted path is a folder, and where each link leads."""

    mounted: Mapping[str, bool]
    links: Mapping[str, str]


@functools.cache
def view_of(paths: tuple[str, ...]) -> View:
    """Return how these absolute paths can be seen; those that do not exist are left out."""
    mounted: dict[str, bool] = {}
    links: dict[str, str] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            where = _follow(path, links)
            mounted[where] = os.path.isdir(where)
    outer: dict[str, bool] = {}
    for where in sorted(mounted):
        if not any(where.startswith(f"{other}/") for other in outer):
            outer[where] = mounted[where]
    visible = {link: to for link, to in links.items() if not _is_beneath(link, outer)}
    return View(outer, visible)


def _is_beneath(path: str, mounted: Iterable[str]) -> bool:
    return any(path.startswith(f"{other}/") for other in mounted)


def _follow(path: str, links: dict[str, str]) -> str:
    """Return the path without links in it, and note those on the way. Raises OSError."""
    at, left, count = "", [part for part in path.split("/") if part not in ("", ".")], 0
    while left:
        part = left.pop(0)
        if part == "..":
            at = os.path.dirname(at).rstrip("/")
            continue
        step = f"{at}/{part}"
        if not stat.S_ISLNK(os.lstat(step).st_mode):
            at = step
            continue
        count += 1
        if count > _MAX_LINKS:
            raise OSError(f"too many links on the way to {path}")
        links[step] = target = os.readlink(step)
        if target.startswith("/"):
            at = ""
        left[:0] = [part for part in target.split("/") if part not in ("", ".")]
    if not at:
        raise OSError("the root itself")
    return at


def missing(machine: str) -> str:
    """Why this kernel lacks the layer; empty if it may have it, which only trying shows."""
    return "" if machine in NUMBERS else f"file systems cannot be mounted on {machine}"


def enter(paths: Iterable[str], own: Path) -> None:
    """Let this process see these absolute paths and ``own``, and no others, for good. Raises OSError.

    Its working directory is the new root.
    """
    machine = platform.machine()
    known, made = view_of(tuple(paths)), {"/"}
    namespaces.make(machine, _NEW_MOUNTS)
    call = NUMBERS[machine]
    where = _follow(str(own), links := dict(known.links))

    def mount(
        source: bytes, target: str, kind: bytes | None, flags: int, options: bytes | None = None
    ) -> None:
        kernel.syscall(call["mount"], source, os.fsencode(target), kind, flags, options)

    mount(b"none", "/", None, _RECURSIVE | _PRIVATE)
    itself = kernel.syscall(call["open_tree"], _HERE, os.fsencode(where), _CLONE | os.O_CLOEXEC)
    try:
        # There is a folder where nothing else is mounted from.
        mount(b"tmpfs", where, b"tmpfs", _NO_SUID | _NO_DEVICES, _OPTIONS)
        for path, is_folder in known.mounted.items():
            _make(where, path, is_folder, made)
            with contextlib.suppress(FileNotFoundError):  # removed since it was looked for
                mount(os.fsencode(path), where + path, None, _BIND | _RECURSIVE)
        if not _is_beneath(where, known.mounted):
            _make(where, where, True, made)
        kernel.syscall(call["move_mount"], itself, b"", _HERE, os.fsencode(where + where), _OF_DESCRIPTOR)
    finally:
        os.close(itself)
    for link, target in links.items():
        if not _is_beneath(link, known.mounted):
            _make(where, os.path.dirname(link), True, made)
            with contextlib.suppress(FileExistsError):
                os.symlink(target, where + link)
    mount(b"none", where, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    os.chdir(where)
    kernel.syscall(call["pivot_root"], b".", b".")
    kernel.syscall(call["umount2"], b".", _DETACH)
    os.chdir("/")


def _make(root: str, path: str, is_folder: bool, made: set[str]) -> None:
    """Make what something can be mounted on. ``made``: the folders that are there."""
    folder = path if is_folder else os.path.dirname(path)
    missing = []
    while folder not in made:
        missing.append(folder)
        folder = os.path.dirname(folder)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # within something that is mounted
            os.mkdir(root + folder)
        made.add(folder)
    if not is_folder:
        os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
