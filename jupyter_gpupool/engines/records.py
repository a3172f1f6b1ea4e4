"""Workers' state files: how a pool that was killed and started again finds who computes for it.

``<folder>/<lease>.json`` holds ``{"lease", "pid", "created", "port"}``, then also ``usage`` as the worker
last reported it, and at last ``code``, the worker's exit code.

``<lease>.order`` beside it holds ``{"order": a new name, "limits": {GPU uuid: MiB}}``: what the pool wants the
worker to keep to. It looks there a few times a second, and answers in its state file with ``obeyed``:
``{"order", "in_use": {GPU uuid: MiB in use that are more}}``; where something is, it changed nothing.

A worker is forked under a lock that it gives back once its file is written, and none is forked for a pool
that is gone. So whoever takes the lock after that pool's end sees every worker that it ever had.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LOCK = "forking.lock"
#: ``<lease>.door``: the socket to which connections for that lease's worker are handed, where one port serves all.
DOOR = ".door"


def path(folder: str, lease_id: str) -> Path:
    return Path(folder) / f"{lease_id}.json"


def read(file: Path) -> dict[str, Any] | None:
    """What a state file says; None if it cannot be read."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and {"lease", "pid", "created", "port"} <= set(content)
    return content if whole else None


def write(file: Path, content: dict[str, Any]) -> None:
    """Replace a file so that nobody sees it half-written, readable by its owner alone. Raises OSError."""
    draft = f"{file}.new"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        json.dump(content, f)
    os.replace(draft, file)


async def obeyed(
    file: Path, limits: Mapping[str, int], gone: asyncio.Event, timeout_s: float
) -> dict[str, int] | None:
    """Have the worker with that state file keep to those limits: what is in use that is more, by GPU uuid (then it
    changed nothing); None where it is ``gone`` or does not answer in time. Raises OSError."""
    name = secrets.token_hex(8)
    write(_order_of(file), {"order": name, "limits": dict(limits)})
    deadline = time.monotonic() + timeout_s
    while not gone.is_set() and time.monotonic() < deadline:
        said = (read(file) or {}).get("obeyed", {})
        if said.get("order") == name:
            return dict(said["in_use"])
        await asyncio.sleep(0.02)
    return None


def read_order(file: Path) -> dict[str, Any] | None:
    """The last order to the worker with that state file, if there is one."""
    try:
        return json.loads(_order_of(file).read_text())
    except (OSError, ValueError):
        return None


def _order_of(file: Path) -> Path:
    return file.with_suffix(".order")


def remove(file: Path) -> None:
    order = _order_of(file)
    for name in (file, Path(f"{file}.new"), order, Path(f"{order}.new"), file.with_suffix(DOOR)):
        with contextlib.suppress(OSError):
            name.unlink()


def files(folder: str) -> Iterator[Path]:
    return Path(folder).glob("*.json")


def lock(folder: str) -> int:
    """Wait for the lock; a descriptor to close. Forks of the caller hold it until they close theirs."""
    descriptor = os.open(Path(folder) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


async def until_recorded(folder: str, timeout_s: float) -> bool:
    """Wait until every worker that has been forked is recorded; False if that took too long."""
    descriptor = os.open(Path(folder) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
