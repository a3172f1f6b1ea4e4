"""Find this user's running pool, or start one for as long as it is needed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jupyter_core.paths import jupyter_runtime_dir

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core import processes
from jupyter_gpupool.core.errors import PoolError, PoolUnreachable
from jupyter_gpupool.core.files import write_atomically

#: How long a started pool may take until it answers, in seconds.
START_TIMEOUT_S = 60.0
#: How long a new pool waits for one that is ending, in seconds.
END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class PoolAddress:
    """A pool's address, token, process id, and the certificate (PEM) of the authority to trust."""

    url: str
    token: str
    pid: int = 0
    ca: str = ""
    also: tuple[str, ...] = ()  # addresses of the pool's other servers
    login: str = ""  # the file of a login, which takes the token's place


def folder() -> Path:
    """Return the directory in which pools publish their addresses; readable by this user alone."""
    path = Path(jupyter_runtime_dir()) / "gpupool"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def publish(url: str, token: str) -> Path:
    """Publish this process's pool to this user's other processes. Return the file."""
    me = os.getpid()
    path = folder() / f"pool-{me}.json"
    created = processes.birth(me)
    content = {"url": url, "token": token, "pid": me, "created": created, "version": __version__}
    write_atomically(path, json.dumps(content))
    return path


def announce_end() -> None:
    """Mark this process's pool as ending: nobody finds it any more, and a new pool waits for :func:`withdraw`."""
    path = folder() / f"pool-{os.getpid()}.json"
    with contextlib.suppress(FileNotFoundError):
        write_atomically(path, json.dumps({**json.loads(path.read_text()), "ending": True}))


def new_token() -> str:
    """Return 256 random bits as text."""
    return secrets.token_urlsafe(32)


def user_token() -> str:
    """Return the token of all of this user's pools, so that clients survive a pool's restart."""
    path = folder() / "token"
    with _exclusively("token"):
        try:
            known = path.read_text().strip()
        except OSError:
            known = ""
        if len(known) < 40:  # none yet, or cut off by a full disk
            known = new_token()
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
                f.write(known)
    return known


def withdraw() -> None:
    """Undo :func:`publish`."""
    (folder() / f"pool-{os.getpid()}.json").unlink(missing_ok=True)


def find() -> PoolAddress | None:
    """Return this user's newest running pool; None where none runs, or only one that is ending."""
    found = [(created, address) for created, address, is_ending in _published() if not is_ending]
    return max(found, key=lambda item: item[0])[1] if found else None


def wait_for_ending(notify: Callable[[PoolAddress], None] = lambda address: None) -> None:
    """Wait until the pools that other processes are ending have ended: each may still hold the user's ledger.

    ``notify`` is called with each such pool. Returns after ``END_TIMEOUT_S`` at the latest.
    """
    deadline = time.monotonic() + END_TIMEOUT_S
    notified = set()
    while time.monotonic() < deadline:
        ending = [a for _, a, is_ending in _published() if is_ending and a.pid != os.getpid()]
        if not ending:
            return
        for address in ending:
            if address not in notified:
                notified.add(address)
                notify(address)
        time.sleep(0.02)


def _published() -> list[tuple[float, PoolAddress, bool]]:
    """Return the pools that live: when its process started, its address, whether it is ending. Remove others' files."""
    found = []
    for path in folder().glob("pool-*.json"):
        try:
            content = json.loads(path.read_text())
            address = PoolAddress(content["url"], content["token"], content["pid"])
            created, is_ending = content["created"], content.get("ending", False)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being replaced or removed at this moment
        if processes.lives(address.pid, created):
            found.append((created, address, is_ending))
        else:
            path.unlink(missing_ok=True)
    return found


def find_or_start(say: Callable[[str], None] = lambda line: None) -> PoolAddress:
    """Return this user's pool. If none runs, start one that ends once this process and all leases have ended.

    ``say`` is called with a line for people before the start. Raises PoolError when the pool cannot start.
    """
    address = find()
    if address is not None:
        return address
    if sys.platform != "linux":
        raise PoolError(
            "no GPU pool is running, and one can start on Linux only. Set GPUPOOL_URL to use a pool on a GPU server."
        )
    with _exclusively("start"):
        return find() or _start(say)


#: Write ends of pipes to the started pools; the system closes them when this process ends.
_lifelines: list[int] = []


def _start(say: Callable[[str], None]) -> PoolAddress:
    say("No GPU pool is running; starting one for as long as it is needed")
    theirs, ours = os.pipe()
    log = folder() / "ephemeral.log"
    try:
        with open(log, "wb") as errors:
            os.chmod(log, 0o600)
            process = subprocess.Popen(
                processes.command(
                    "jupyter_gpupool.server.daemon.pool_app", f"--GPUPoolServer.starter_fd={theirs}"
                ),
                pass_fds=[theirs],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={k: v for k, v in os.environ.items() if k != "GPUPOOL_LEASE"},
                start_new_session=True,
            )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    _lifelines.append(ours)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        address = find()
        if address is not None and address.pid == process.pid:
            return address
        if process.poll() is not None:
            raise PoolError(f"the GPU pool could not start: {_last_line(log)}")
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise PoolUnreachable(f"the GPU pool did not start within {START_TIMEOUT_S:g} s; see {log}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its log is empty"


@contextlib.contextmanager
def _exclusively(name: str) -> Iterator[None]:
    """Hold a file lock, so that only one process at a time runs the block."""
    import fcntl  # pools start on Linux only

    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _after_fork() -> None:
    # A forked child must not keep its parent's pool alive.
    while _lifelines:
        os.close(_lifelines.pop())


if hasattr(os, "register_at_fork"):  # a system without it has no fork either
    os.register_at_fork(after_in_child=_after_fork)
