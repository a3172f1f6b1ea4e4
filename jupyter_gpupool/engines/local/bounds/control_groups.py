"""Control groups (cgroup v2): one for each worker, where the service has a part of their tree to itself."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from .limits import Limits

#: Without these a group bounds nothing; the processor's is used where it is to be had.
_NEEDED, _WANTED = ("memory", "pids"), ("cpu",)
#: systemd marks so what it has delegated.
_DELEGATED = "user.delegate"
#: The group of the service's own processes, where they were in the way of others.
_OWN_LEAF = "gpupool"
_PREFIX = "gpupool-worker-"
_TRIES = 5
#: Between two tries to replace a group, in seconds.
_PAUSE_S = 0.02


class NotDelegated(Exception):
    """There can be no control groups; the message is the reason."""


class ControlGroups:
    """The workers' groups. ``parent`` has one folder for each."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent

    def path(self, lease_id: str) -> Path:
        """The group of a lease's worker."""
        return self.parent / f"{_PREFIX}{lease_id}"

    def make(self, lease_id: str, limits: Limits) -> Path:
        """Make the group of a new worker. Raises OSError."""
        group = self.path(lease_id)
        for attempt in range(_TRIES):
            self.end(lease_id)  # of a worker that it takes the place of
            try:
                group.mkdir()
                break
            except FileExistsError:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(_PAUSE_S)  # what was killed is still ending
        try:
            # Several processes of a worker end together: one that goes on without another may compute nonsense.
            _write(group / "memory.oom.group", "1")
            with contextlib.suppress(FileNotFoundError, PermissionError):  # a kernel without swap
                _write(group / "memory.swap.max", "0")
            self.change(lease_id, limits)
        except OSError:
            self.end(lease_id)
            raise
        return group

    def change(self, lease_id: str, limits: Limits) -> None:
        """Give a group other limits. Raises OSError, also where there is no such group."""
        group = self.path(lease_id)
        _write(group / "memory.max", str(limits.memory_mib << 20) if limits.memory_mib else "max")
        _write(group / "pids.max", str(limits.tasks))
        with contextlib.suppress(FileNotFoundError, PermissionError):  # without the processor's controller
            _write(group / "cpu.weight", str(limits.weight))

    def was_ended_for_memory(self, lease_id: str) -> tuple[bool, bool]:
        """Whether the kernel has ended a process of that group for memory, and whether for the group's own limit.

        Otherwise the machine's memory, or that of a group above, was used up, by whomever.
        """
        events = self.path(lease_id) / "memory.events"
        return _counted(events, "oom_kill") > 0, _counted(events, "oom") > 0

    def end(self, lease_id: str) -> bool:
        """End what is left in a group, and remove it; return False where what was killed is still ending."""
        group = self.path(lease_id)
        with contextlib.suppress(OSError):  # a kernel before 5.14
            _write(group / "cgroup.kill", "1")
        try:
            group.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def lease_ids(self) -> list[str]:
        """The leases that have a group."""
        return [group.name[len(_PREFIX) :] for group in self.parent.glob(f"{_PREFIX}*")]


def join(group: str) -> None:
    """Move this process into a group. Raises OSError."""
    _write(Path(group) / "cgroup.procs", "0")


def delegated(proc: Path = Path("/proc/self")) -> ControlGroups:
    """Return where this process may make groups, ready for use. Raises NotDelegated."""
    mount, own = _place(proc)
    if own != mount and _is_delegated(own.parent) and not _is_delegated(own):
        parent = own.parent
    elif _is_delegated(own) and _is_root_of_container(mount, own):
        parent = own
    elif _is_delegated(own):
        # With processes in it, the next start of the service would fail while workers are left.
        raise NotDelegated("the service's own processes are in the way: its unit needs DelegateSubgroup=")
    else:
        raise NotDelegated("no part of their tree is this service's own: its unit needs Delegate=")
    offered = _words(parent / "cgroup.controllers")
    lacking = [name for name in _NEEDED if name not in offered]
    if lacking:
        raise NotDelegated(f"{' and '.join(lacking)} cannot be bounded here: the controllers are not offered")
    try:
        if parent == own:
            _make_way(own)
        _write(parent / "cgroup.subtree_control", " ".join(f"+{name}" for name in _NEEDED))
        for name in _WANTED:
            with contextlib.suppress(OSError):
                _write(parent / "cgroup.subtree_control", f"+{name}")
    except OSError as e:
        raise NotDelegated(f"{parent} cannot be divided: {e.strerror}") from None
    return ControlGroups(parent)


def _place(proc: Path) -> tuple[Path, Path]:
    """Return where cgroup v2 is mounted, and this process's own group."""
    try:
        mounts = (proc / "mountinfo").read_text().splitlines()
        groups = (proc / "cgroup").read_text().splitlines()
    except OSError as e:
        raise NotDelegated(f"the kernel does not tell where this process is: {e.strerror}") from None
    found = [line.split(" ") for line in mounts if line.partition(" - ")[2].startswith("cgroup2 ")]
    own = [line[3:] for line in groups if line.startswith("0::")]
    if not found or not own:
        raise NotDelegated("no control groups of version 2 are mounted here")
    root, mount = found[0][3], Path(found[0][4])
    inside = own[0].removeprefix(root if root != "/" else "").lstrip("/")
    if ".." in inside.split("/"):
        raise NotDelegated("this process's control group is not visible here")
    return mount, mount / inside


def _is_delegated(group: Path) -> bool:
    """Whether it was given to this service, which may divide it."""
    if not os.access(group / "cgroup.subtree_control", os.W_OK):
        return False
    try:
        return os.getxattr(group, _DELEGATED) == b"1"
    except OSError:
        return (group / "cgroup.type").exists() and group.is_mount()


def _is_root_of_container(mount: Path, own: Path) -> bool:
    # The machine's own root has no type, and is nobody's to divide.
    return own == mount and (own / "cgroup.type").exists()


def _make_way(own: Path) -> None:
    """Move all processes of a group into one below it, for a group with processes cannot be divided."""
    leaf = own / _OWN_LEAF
    leaf.mkdir(exist_ok=True)
    for _ in range(_TRIES):
        pids = _words(own / "cgroup.procs")
        if not pids:
            return
        for pid in pids:
            try:
                _write(leaf / "cgroup.procs", pid)
            except OSError as e:
                if e.errno != errno.ESRCH:  # it has ended meanwhile
                    raise


def _counted(file: Path, name: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
        return next((int(value) for key, value in pairs if key == name), 0)
    except (OSError, ValueError):
        return 0


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _write(file: Path, text: str) -> None:
    # The file is the kernel's, and is never made here.
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
