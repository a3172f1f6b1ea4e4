"""Workers' state files: how a pool that was killed and restarted finds its workers.

``<folder>/<lease>.json`` holds ``{"lease", "pid", "created", "port"}``, then also ``usage`` as the worker
last reported it, and at last ``code``, the worker's exit code.

``<lease>.order`` beside it holds ``{"order": a new name, "limits": {GPU uuid: MiB}}``: limits that the pool orders.
The worker checks it a few times a second, and answers in its state file with ``obeyed``:
``{"order", "in_use": {GPU uuid: MiB in use beyond the limit}}``. If anything is, it has changed no limit.

A worker is forked under a lock that it releases once its file is written, and none is forked for a pool that is gone.
So a process that takes the lock after the pool's end sees every worker of that pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
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


def path(folder: str, lease_id: str) -> Path:
    """The state file of a lease's worker."""
    return Path(folder) / f"{lease_id}.json"


def read(file: Path) -> dict[str, Any] | None:
    """The content of a state file; None if it cannot be read."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and {"lease", "pid", "created", "port"} <= set(content)
    return content if whole else None


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
    write(_order_of(file), {"order": name, "limits": dict(limits)})
    deadline = time.monotonic() + timeout_s
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
    return file.with_suffix(".order")


def remove(file: Path) -> None:
    """Delete a state file and all that belongs to it."""
    drafts = file.parent.glob(f".{file.stem}.*")  # of a worker that was killed while it wrote
    for name in (file, _order_of(file), file.with_suffix(DOOR), file.with_suffix(CONTROL), *drafts):
        with contextlib.suppress(OSError):
            name.unlink()


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
