"""The workers of this machine as their engine knows them: where they listen, and when they end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Collection
from logging import LoggerAdapter
from pathlib import Path
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.engine import WorkerExit
from jupyter_gpupool.core.models import LeaseState, WorkerAddress, WorkerUsage

from . import worker_files
from .exit_codes import end_of

#: How long a worker may take to end after SIGTERM, in seconds.
_GRACE_S = 2.0
#: How long a worker may take to end after SIGKILL, in seconds.
_KILL_TIMEOUT_S = 30.0


class LocalWorkers:
    """Workers by lease id. ``folder`` has their state files. ``on_exit`` is called once for each that ends."""

    def __init__(self, folder: str, log: Any) -> None:
        self._folder = folder
        self._log: LoggerAdapter[Any] = log
        self.on_exit: WorkerExit = lambda lease_id, state, reason: None
        #: whether another worker takes the place of one that ended by itself, with that exit code
        self.replace: Callable[[str, WorkerAddress, int | None], bool] = lambda lease_id, worker, code: False
        #: called instead of ``on_exit`` for a worker whose lease goes on elsewhere
        self.on_left: Callable[[str], None] = lambda lease_id: None
        #: why a worker that has ended went beyond its bounds; empty for any other end
        self.excess: Callable[[str], str] = lambda lease_id: ""
        self._addresses: dict[str, WorkerAddress] = {}
        self._gone: dict[str, asyncio.Event] = {}
        self._watched: dict[str, int] = {}  # pidfds
        self._stopping: set[str] = set()
        #: leases that go on at another server: the ends of their workers here are not those of the leases
        self.leaving: set[str] = set()

    def addresses(self) -> dict[str, WorkerAddress]:
        """Every worker's address, by lease id."""
        return dict(self._addresses)

    def gone(self, lease_id: str) -> asyncio.Event | None:
        """Set once that worker has ended; None if there is no such worker."""
        return self._gone.get(lease_id)

    def usage(self) -> dict[str, WorkerUsage]:
        """What each worker last wrote of its use, by lease id."""
        found = {}
        for lease_id in self._addresses:
            use = (worker_files.read(worker_files.path(self._folder, lease_id)) or {}).get("usage")
            if use:
                # A worker that a former version of the engine started reports less.
                found[lease_id] = WorkerUsage(
                    use["allocated_bytes"],
                    use["busy"],
                    use["sessions"],
                    use.get("held_at"),
                    use.get("reconnects", 0),
                    use.get("frameworks", ()),
                    use.get("overhead_bytes", {}),
                )
        return found

    def add(self, lease_id: str, worker: WorkerAddress) -> None:
        """A new worker. The process that it was forked from reports its end to :meth:`remove`."""
        self._addresses[lease_id] = worker
        self._gone[lease_id] = asyncio.Event()

    def adopt(self, lease_id: str, worker: WorkerAddress) -> None:
        """A worker that no process of this engine was the parent of; its end is watched for here."""
        self.add(lease_id, worker)
        self._watch(lease_id, worker)

    def adopt_all(self, lease_ids: Collection[str], kill: bool) -> None:
        """Watch for the end of those workers, because their parent died. ``kill``: end them, too."""
        for lease_id, worker in list(self._addresses.items()):
            if lease_id not in lease_ids or lease_id in self._watched:
                continue
            if kill:
                processes.send(worker.pid, worker.created, signal.SIGKILL)
            self._watch(lease_id, worker)

    def remove(self, lease_id: str, code: int | None) -> None:
        """A worker has ended. ``code``: its exit code; None: the one in its state file."""
        worker = self._addresses.pop(lease_id, None)
        if worker is None:
            return
        self._unwatch(lease_id)
        if code is None:  # whoever reaps a worker does that before
            processes.kill_group(worker.pid, worker.created)
        file = worker_files.path(self._folder, lease_id)
        if code is None:
            code = (worker_files.read(file) or {}).get("code")
        self.delete(worker_files.forget(file))
        self._gone.pop(lease_id).set()
        excess = self.excess(lease_id)
        if lease_id in self.leaving:
            self.on_left(lease_id)
        elif excess:
            self.on_exit(lease_id, LeaseState.LOST, excess)
        elif lease_id in self._stopping or not self.replace(lease_id, worker, code):
            self.on_exit(lease_id, *end_of(code))

    def delete(self, *directories: Path | None) -> None:
        """Delete what workers have left, which may take long, in another thread."""
        for directory in directories:
            if directory is not None:
                asyncio.get_running_loop().run_in_executor(None, worker_files.delete, directory)

    async def stop(self, lease_id: str) -> None:
        """End a worker, if there is one; returns when it is gone."""
        worker = self._addresses.get(lease_id)
        if worker is None:
            return
        gone = self._gone[lease_id]
        self._stopping.add(lease_id)
        try:
            for sig, timeout_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _KILL_TIMEOUT_S)):
                processes.send(worker.pid, worker.created, sig)
                try:
                    await asyncio.wait_for(gone.wait(), timeout_s)
                    return
                except (TimeoutError, asyncio.TimeoutError):
                    continue
        finally:
            self._stopping.discard(lease_id)
        self._log.error("The worker of lease %s (pid %d) cannot be killed", lease_id, worker.pid)

    async def stop_all(self) -> None:
        """End every worker; returns when all of them are gone."""
        await asyncio.gather(*(self.stop(lease_id) for lease_id in list(self._addresses)))

    def forget_all(self) -> None:
        """Stop watching; the workers that are left go on."""
        for lease_id in list(self._watched):
            self._unwatch(lease_id)
        self._addresses.clear()
        self._gone.clear()

    def _watch(self, lease_id: str, worker: WorkerAddress) -> None:
        try:
            fd = os.pidfd_open(worker.pid)
        except OSError:
            self.remove(lease_id, None)
            return
        self._watched[lease_id] = fd
        asyncio.get_running_loop().add_reader(fd, self.remove, lease_id, None)
        if not processes.lives(worker.pid, worker.created):
            self.remove(lease_id, None)

    def _unwatch(self, lease_id: str) -> None:
        fd = self._watched.pop(lease_id, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
