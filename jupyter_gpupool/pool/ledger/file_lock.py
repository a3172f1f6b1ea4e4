"""One pool per ledger: a lock that the operating system releases however its holder ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

from jupyter_gpupool.core.errors import PoolError


def ledger_file(url: str) -> Path | None:
    """The file of a ledger that only one pool may open; None if the ledger has none."""
    if url.startswith("sqlite:///") and url != "sqlite:///:memory:":
        return Path(os.path.abspath(url[len("sqlite:///") :]))
    return None


@final
class LedgerLock:
    """An exclusive lock on ``<ledger file>.lock``, held from ``acquire`` until ``release`` or death.

    It belongs to the open file, which is not inherited by programs that this process starts. Usable
    as a context manager.
    """

    def __init__(self, ledger: Path | str) -> None:
        self.path = Path(f"{ledger}.lock")
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock at once, or raise :class:`PoolError` naming the process that holds it."""
        if self._descriptor is not None:
            return
        import fcntl  # a pool runs on Linux only, and its modules are imported elsewhere too

        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PoolError(f"the lock {self.path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise PoolError(f"{who} runs a pool on this ledger already (lock {self.path})") from error
        except OSError as error:
            os.close(descriptor)
            raise PoolError(f"the lock {self.path} cannot be taken: {error.strerror}") from error
        self._descriptor = descriptor
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # a full disk: the lock itself holds, only its holder's name is missing

    def release(self) -> None:
        """Release the lock. The file stays: if it were removed, two processes could hold the lock at once."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> LedgerLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
