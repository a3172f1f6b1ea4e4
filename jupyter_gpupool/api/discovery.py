"""Finding the pool that this user runs already, or starting one for as long as it is needed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jupyter_core.paths import jupyter_runtime_dir

from .. import __version__
from ..engines import process as processes
from ..pool.errors import PoolError, PoolUnreachable

#: How long a pool may take to answer after its start, in seconds.
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PoolAddress:
    """Where a pool answers, the token that it wants, and (PEM) whose word for its certificate is to be taken."""

    url: str
    token: str
    pid: int = 0
    ca: str = ""
    also: tuple[str, ...] = ()  # where the pool's other servers answer


def folder() -> Path:
    """Where pools publish themselves; readable by this user alone."""
    path = Path(jupyter_runtime_dir()) / "gpupool"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def publish(url: str, token: str) -> Path:
    """Let this user's other processes find the pool of this process."""
    me = os.getpid()
    path = folder() / f"pool-{me}.json"
    created = processes.birth(me)
    content = {"url": url, "token": token, "pid": me, "created": created, "version": __version__}
    with os.fdopen(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        json.dump(content, f)
    os.replace(f"{path}.new", path)
    return path


def new_token() -> str:
    """256 random bits as text."""
    return secrets.token_urlsafe(32)


def user_token() -> str:
    """The token of this user's pools: one for all, so that clients outlive a pool's restart."""
    path = folder() / "token"
    with _alone("token"):
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
    """The newest pool of this user whose process lives; files of dead ones are removed."""
    found: list[tuple[float, PoolAddress]] = []
    for path in folder().glob("pool-*.json"):
        try:
            content = json.loads(path.read_text())
            address = PoolAddress(content["url"], content["token"], content["pid"])
            created = content["created"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # just being replaced or removed
        if processes.lives(address.pid, created):
            found.append((created, address))
        else:
            path.unlink(missing_ok=True)
    return max(found, key=lambda item: item[0])[1] if found else None


def find_or_start(say: Callable[[str], None] = lambda line: None) -> PoolAddress:
    """This user's pool; if none runs, one is started that ends once this process and all leases have.

    ``say`` is told what takes longer than a moment. Raises PoolError when the pool cannot start.
    """
    address = find()
    if address is not None:
        return address
    with _alone("start"):
        return find() or _start(say)


#: Write ends that tell started pools that this process lives; closed by the system when it does not.
_lifelines: list[int] = []


def _start(say: Callable[[str], None]) -> PoolAddress:
    say("No GPU pool is running; starting one for the duration of this work")
    theirs, ours = os.pipe()
    log = folder() / "ephemeral.log"
    try:
        with open(log, "wb") as errors:
            os.chmod(log, 0o600)
            process = subprocess.Popen(
                processes.command("jupyter_gpupool.api.server", f"--PoolApp.starter_fd={theirs}"),
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
    return lines[-1].strip() if lines else "it said nothing"


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Keeps two processes from doing the same thing at the same moment."""
    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _after_fork() -> None:
    # A fork must not keep a pool alive on its parent's behalf.
    while _lifelines:
        os.close(_lifelines.pop())


os.register_at_fork(after_in_child=_after_fork)
