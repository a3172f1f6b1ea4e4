"""Workers' state files: how a pool that was killed and restarted finds its workers.

``<folder>/<lease>.json`` holds ``{"lease", "pid", "created", "port"}``. ``<lease>.run`` beside it is the directory that
the worker may write to. There ``report.json`` holds ``usage`` as the worker last reported it, and at last ``code``, the
worker's exit code. A worker could be made to write anything there, so that only these are read, and only if they have
the form that they should have.

``order`` in that directory holds ``{"order": a new name, "limits": {GPU uuid: MiB}}``: limits that the pool orders.
The worker checks it a few times a second, and answers in its report with ``obeyed``:
``{"order", "in_use": {GPU uuid: MiB in use beyond the limit}}``. If anything is, it has changed no limit.

``<lease>.compile`` is the directory of its compile helper, see :mod:`.compile_helpers`, which the worker cannot reach.

What a worker leaves in its directory may be of any depth and size. So the directory is put aside at once, under a name
that no lease has, and deleted later.

A worker is forked under a lock that it releases once its file is written, and none is forked for a pool that is gone.
So a process that takes the lock after the pool's end sees every worker of that pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.files import write_atomically

_LOCK = "forking.lock"
#: How often a worker's answer is looked for, in seconds.
_ANSWER_POLL_INTERVAL_S = 0.02
#: ``<lease>.door``: the socket at which that lease's worker receives its connections from the data port.
DOOR = ".door"
#: ``<lease>.control``: the socket at which the engine asks a worker to park its memory, see transport/control.py.
CONTROL = ".control"
_OWN, _REPORT, _ORDER, _COMPILE = ".run", "report.json", "order", ".compile"
#: ``.<lease>.<random>.old``: the directory of a worker that has ended.
_PUT_ASIDE = ".old"
#: A report is a few hundred bytes for each GPU.
_MAX_REPORT_BYTES = 64 << 10
#: The most frameworks that a worker reports.
_MAX_FRAMEWORKS = 8


def path(folder: str, lease_id: str) -> Path:
    """The state file of a lease's worker."""
    return Path(folder) / f"{lease_id}.json"


def read(file: Path) -> dict[str, Any] | None:
    """The content of a state file, and what its worker has reported; None if it cannot be read."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and {"lease", "pid", "created", "port"} <= set(content)
    return {**content, **_reported(own_directory(file) / _REPORT)} if whole else None


def own_directory(file: Path) -> Path:
    """The directory that the worker with that state file may write to."""
    return file.with_suffix(_OWN)


def make_own_directory(file: Path) -> Path:
    """Create it, empty. Raises OSError."""
    own = own_directory(file)
    _put_aside(own)
    own.mkdir(mode=0o700)
    return own


def compile_directory(file: Path) -> Path:
    """The directory that the compile helper of the worker with that state file may write to."""
    return file.with_suffix(_COMPILE)


def make_compile_directory(file: Path) -> Path:
    """Create it, empty. Raises OSError."""
    _put_aside(compile_directory(file))
    compile_directory(file).mkdir(mode=0o700)
    return compile_directory(file)


def report(file: Path, content: dict[str, Any]) -> None:
    """Replace the report of the worker with that state file, which calls this itself. Raises OSError."""
    write_atomically(own_directory(file) / _REPORT, json.dumps(content))


def _reported(path: Path) -> dict[str, Any]:
    """What a report has that can be believed to be one."""
    try:
        # Neither a link nor a pipe is followed or waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                return {}
            content = json.loads(f.read(_MAX_REPORT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    forms: dict[str, Callable[[Any], bool]] = {
        "usage": _is_usage,
        "obeyed": _is_obeyed,
        "code": lambda code: type(code) is int,
    }
    return {name: content[name] for name, has_form in forms.items() if has_form(content.get(name))}


def _is_usage(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and _is_mapping_to(given.get("allocated_bytes"), int)
        and _is_mapping_to(given.get("busy"), (int, float))
        and type(given.get("sessions")) is int
        and isinstance(given.get("held_at"), (int, float, type(None)))
        and type(given.get("reconnects")) is int
        and _are_names(given.get("frameworks", []))
        and _is_mapping_to(given.get("overhead_bytes", {}), int)
    )


def _are_names(given: Any) -> bool:
    return (
        isinstance(given, list)
        and len(given) <= _MAX_FRAMEWORKS
        and all(isinstance(name, str) and name.isidentifier() and len(name) <= 20 for name in given)
    )


def _is_obeyed(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and isinstance(given.get("order"), str)
        and _is_mapping_to(given.get("in_use"), int)
    )


def _is_mapping_to(given: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(given, dict) and all(isinstance(value, kind) for value in given.values())


def write(file: Path, content: dict[str, Any]) -> None:
    """Replace a file atomically, readable by its owner alone. Raises OSError."""
    write_atomically(file, json.dumps(content))


async def obeyed(
    file: Path, limits: Mapping[str, int], gone: asyncio.Event, timeout_s: float
) -> dict[str, int] | None:
    """Order a worker to keep to limits, in MiB by GPU uuid, and wait for its answer.

    Returns the MiB in use beyond a limit, by GPU uuid; if there are any, the worker has changed no limit. Returns None
    if it is ``gone`` or does not answer in time. Raises OSError.
    """
    name = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_s
    # One that was forked a moment ago makes its directory first, where it looks for orders, and then this file.
    while read(file) is None:
        if gone.is_set() or time.monotonic() > deadline:
            return None
        await asyncio.sleep(_ANSWER_POLL_INTERVAL_S)
    write(_order_of(file), {"order": name, "limits": dict(limits)})
    while not gone.is_set() and time.monotonic() < deadline:
        said = (read(file) or {}).get("obeyed", {})
        if said.get("order") == name:
            return dict(said["in_use"])
        await asyncio.sleep(_ANSWER_POLL_INTERVAL_S)
    return None


def read_order(file: Path) -> dict[str, Any] | None:
    """The last order to the worker with that state file, if there is one."""
    try:
        order = json.loads(_order_of(file).read_text())
    except (OSError, ValueError):
        return None
    return order if isinstance(order, dict) else None


def _order_of(file: Path) -> Path:
    own = own_directory(file)
    return own / _ORDER if own.is_dir() else file.with_suffix(".order")  # for a worker of an earlier version


def forget(file: Path) -> Path | None:
    """Delete a state file and all that belongs to it but the worker's own directory, which :func:`delete` may take.

    Takes no time, whatever the worker has left. Its compile helper's directory goes along with its own.
    """
    with contextlib.suppress(OSError):  # there is none
        os.rename(compile_directory(file), own_directory(file) / secrets.token_hex(8))
    drafts = file.parent.glob(f".{file.stem}.*")  # of a worker that was killed while it wrote
    for name in (file, _order_of(file), file.with_suffix(DOOR), file.with_suffix(CONTROL), *drafts):
        with contextlib.suppress(OSError):
            name.unlink()
    return _put_aside(own_directory(file))


def remove(file: Path) -> None:
    """Delete a state file and all that belongs to it."""
    own = forget(file)
    if own is not None:
        delete(own)


def put_aside(folder: str) -> list[Path]:
    """Return the directories that were put aside, and which nobody has deleted."""
    return list(Path(folder).glob(f".*{_PUT_ASIDE}"))


def _put_aside(own: Path) -> Path | None:
    aside = own.with_name(f".{own.stem}.{secrets.token_hex(8)}{_PUT_ASIDE}")
    try:
        os.rename(own, aside)
    except OSError:
        return None
    return aside


def delete(directory: Path) -> None:
    """Delete a directory of any depth, without following links, as far as possible.

    Lifts the content of each directory in it one level up until only files are left: neither the stack nor the open
    files grow with the depth.
    """
    with contextlib.suppress(OSError):
        top = _open_directory(directory)
        try:
            while directories := _unlink_files(top):
                if not sum(_lift(top, name) for name in directories):
                    break
        finally:
            os.close(top)
        os.rmdir(directory)


def _open_directory(name: str | Path, beneath: int | None = None) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        return os.open(name, flags, dir_fd=beneath)
    os.chmod(name, 0o700, dir_fd=beneath)  # it was made without rights
    return os.open(name, flags, dir_fd=beneath)


def _unlink_files(directory: int) -> list[str]:
    """Delete the files in a directory, and return the names of the others."""
    others = []
    for name in os.listdir(directory):
        try:
            os.unlink(name, dir_fd=directory)
        except OSError:
            others.append(name)
    return others


def _lift(top: int, name: str) -> bool:
    """Move what is in a directory of ``top`` to ``top``, and delete it; return whether it is gone."""
    try:
        directory = _open_directory(name, top)
        try:
            for inner in _unlink_files(directory):
                # To move a directory, one must be able to write to it.
                with contextlib.suppress(PermissionError):
                    os.chmod(inner, 0o700, dir_fd=directory)
                os.rename(inner, secrets.token_hex(8), src_dir_fd=directory, dst_dir_fd=top)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=top)
    except OSError:
        return False
    return True


def files(folder: str) -> Iterator[Path]:
    """Every state file."""
    return Path(folder).glob("*.json")


def lock(folder: str) -> int:
    """Wait for the lock; a descriptor to close. Forks of the caller hold it until they close theirs."""
    import fcntl  # workers run on Linux only, and this module is imported elsewhere too

    descriptor = os.open(Path(folder) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


async def until_recorded(folder: str, timeout_s: float) -> bool:
    """Wait until every worker that has been forked is recorded; False if that took too long."""
    descriptor = os.open(Path(folder) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    import fcntl

    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
            await asyncio.sleep(0.01)
    finally:
        os.close(descriptor)
