"""What a worker takes: its processes' memory and threads from /proc, and its directory's size."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from .limits import MAX_DEPTH, MAX_FILES, Taken

_BLOCK_BYTES = 512
#: How the names of files in memory begin.
_IN_MEMORY = ("/memfd:", "/dev/shm/")
#: What a process counts as that has closed its files to the service: that is to hide something.
_HIDDEN = (-1, 1 << 62, True)
#: The most folders that are open while a directory is measured.
_MAX_OPEN = 512


def members(leaders: Collection[int]) -> dict[int, list[int]]:
    """Return the processes of each of these process groups."""
    found: dict[int, list[int]] = {leader: [] for leader in leaders}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as f:
                group = int(f.read().rpartition(b")")[2].split()[2])
        except (OSError, ValueError, IndexError):
            continue
        if group in found:
            found[group].append(int(name))
    return found


def taken(pids: Collection[int], own: Path, beside: Path) -> Taken:
    """Return what these processes of one worker take; of its directory ``own`` only files that have no name.

    ``beside``: a file on the same disk, for a union of disks, as containers have, names its files' disk otherwise than
    that of its folders.
    """
    disks = _disks(own, beside)
    memory = disk = tasks = 0
    seen: set[tuple[int, int]] = set()
    for pid in pids:
        status = _status(pid)
        # Not what is read from files, which the kernel takes back when it needs memory.
        memory += 1024 * sum(status.get(key, 0) for key in ("RssAnon", "RssShmem", "VmSwap"))
        tasks += status.get("Threads", 0)
        for where, nbytes, in_memory in _unnamed(pid, seen):
            if where in disks:
                disk += nbytes
            elif in_memory:
                memory += nbytes
    return Taken(memory, disk, tasks)


def with_directory(of_processes: Taken, own: Path) -> Taken:
    """Return the same with what is in that directory of the worker; nothing if there is none."""
    nbytes, files, depth = _size(own)
    return replace(
        of_processes,
        disk_bytes=of_processes.disk_bytes + nbytes,
        files=of_processes.files + files,
        depth=max(of_processes.depth, depth),
    )


def _disks(*paths: Path) -> set[int]:
    found = set()
    for path in paths:
        with contextlib.suppress(OSError):
            found.add(os.stat(path).st_dev)
    return found


def _status(pid: int) -> Mapping[str, int]:
    """The numbers in a process's status; sizes in KiB."""
    found = {}
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                key, _, value = line.partition(":")
                if key in ("RssAnon", "RssShmem", "VmSwap", "Threads"):
                    found[key] = int(value.split()[0])
    except (OSError, ValueError, IndexError):
        pass  # it has ended
    return found


def _unnamed(pid: int, seen: set[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """Device and bytes of each open file that has no name, and whether it is in memory; others were deleted."""
    found = []
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return [_HIDDEN]
    except OSError:
        return []
    for name in names:
        path = f"/proc/{pid}/fd/{name}"
        try:
            about = os.stat(path)
            in_memory = os.readlink(path).startswith(_IN_MEMORY)
        except PermissionError:
            return [_HIDDEN]
        except OSError:
            continue
        key = about.st_dev, about.st_ino
        if stat.S_ISREG(about.st_mode) and not about.st_nlink and key not in seen:
            seen.add(key)
            found.append((about.st_dev, about.st_blocks * _BLOCK_BYTES, in_memory))
    return found


def _size(own: Path) -> tuple[int, int, int]:
    """Bytes, files and depth of a directory. Looks no further once there are too many files, or too deep ones."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        left = [(os.open(own, flags), 1)]
    except OSError:
        return 0, 0, 0
    nbytes = files = deepest = 0
    while left:
        directory, depth = left.pop()
        deepest = max(deepest, depth)
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    files += 1
                    if files > MAX_FILES or depth > MAX_DEPTH:
                        break
                    try:
                        about = entry.stat(follow_symlinks=False)
                        nbytes += about.st_blocks * _BLOCK_BYTES
                        if stat.S_ISDIR(about.st_mode) and len(left) < _MAX_OPEN:
                            left.append((os.open(entry.name, flags, dir_fd=directory), depth + 1))
                        elif stat.S_ISDIR(about.st_mode):
                            files = MAX_FILES + 1  # as many folders beside each other as nobody needs
                    except PermissionError:
                        files = MAX_FILES + 1  # a folder that it has closed to others
                    except OSError:
                        continue  # it is gone
        except OSError:
            pass
        finally:
            os.close(directory)
        if files > MAX_FILES or deepest > MAX_DEPTH:
            for other, _ in left:
                os.close(other)
            break
    return nbytes, files, deepest
