"""The bounds of an engine's workers: sets them where the kernel keeps them, and watches what it does not keep."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from logging import LoggerAdapter
from typing import Any

import psutil

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.models import WorkerAddress
from jupyter_gpupool.engines.local import worker_files
from jupyter_gpupool.transport.specs import WorkerSpec

from . import measure, own_limits
from .control_groups import ControlGroups, NotDelegated, delegated
from .limits import Limits, Taken, excess, limits_of, machine_out_of_memory, out_of_memory

#: Seconds between two looks at the workers' processes, and at their directories.
INTERVAL_S = 0.5
_DIRECTORY_INTERVAL_S = 2.0
#: Seconds between two tries to remove a group whose processes are still ending, and how often that is tried.
_REMOVAL_INTERVAL_S, _REMOVAL_TRIES = 0.1, 600

#: The layers, as health names them.
CONTROL_GROUPS, HOST_MEMORY, DISK = "control groups", "host memory", "disk"


class Bounds:
    """The bounds of the workers of one engine, whose state files are in ``folder``.

    ``host_memory_mib``: what each may have, None for what follows from its slices, 0 for no limit.
    ``disk_mib``: what each may write to its own directory, 0 for no limit. ``lent_mib``: the host memory that a lease
    has of the arena, which is not its worker's. ``groups``: where control groups are to be made; None: find out.
    """

    def __init__(
        self,
        folder: str,
        *,
        host_memory_mib: int | None,
        disk_mib: int,
        workers: Callable[[], Mapping[str, WorkerAddress]],
        lent_mib: Callable[[str], int],
        log: Any,
        groups: ControlGroups | None = None,
    ) -> None:
        self._folder = folder
        self._host_memory_mib = host_memory_mib
        self._disk_mib = disk_mib
        self._workers = workers
        self._lent_mib = lent_mib
        self._log: LoggerAdapter[Any] = log
        self._machine_mib = psutil.virtual_memory().total >> 20
        self.groups = groups
        #: why workers lack each layer, empty if they have it
        self.missing: Mapping[str, str] = {}
        self._limits: dict[str, Limits] = {}
        self._reasons: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._removals: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Find out what bounds there can be, and watch from now on."""
        why = ""
        if self.groups is None:
            try:
                self.groups = delegated()
            except NotDelegated as e:
                why = str(e)
        none = "host_memory_mib is set to 0" if self._host_memory_mib == 0 else ""
        self.missing = {
            CONTROL_GROUPS: why and f"{why}; limits of processes and a watch stand in for them",
            HOST_MEMORY: none,
            DISK: "" if self._disk_mib else "worker_disk_mib is set to 0",
        }
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Watch no longer. What the kernel keeps stays."""
        for removal in list(self._removals.values()):
            removal.cancel()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def admit(self, spec: WorkerSpec) -> dict[str, Any]:
        """Return what a new worker is to enter, as JSON. Raises OSError if it can have no control group."""
        limits = self._limits[spec.lease_id] = self._of(spec)
        self._reasons.pop(spec.lease_id, None)
        removal = self._removals.pop(spec.lease_id, None)
        if removal is not None:  # it would remove the new group
            removal.cancel()
        group = str(self.groups.make(spec.lease_id, limits)) if self.groups is not None else ""
        return own_limits.to_json(limits, group)

    def follow(self, spec: WorkerSpec) -> None:
        """Bound a worker that runs by the slices that it has now."""
        self._limits[spec.lease_id] = limits = self._of(spec)
        if self.groups is not None:
            with contextlib.suppress(OSError):  # an earlier engine had no groups
                self.groups.change(spec.lease_id, limits)

    def settle(self, lease_ids: set[str]) -> None:
        """Forget what an earlier engine has left of all other leases."""
        for lease_id in self.groups.lease_ids() if self.groups is not None else ():
            if lease_id not in lease_ids:
                self._remove_group(lease_id)

    def ended(self, lease_id: str) -> str:
        """Note that a worker has ended; return why, if it was for its bounds, in words for its user."""
        limits, reason = self._limits.pop(lease_id, None), self._reasons.pop(lease_id, "")
        if self.groups is not None:
            ended, for_its_own = self.groups.was_ended_for_memory(lease_id)
            if not reason and limits is not None and ended:
                reason = out_of_memory(limits) if for_its_own else machine_out_of_memory()
            self._remove_group(lease_id)
        return reason

    def _remove_group(self, lease_id: str) -> None:
        """End a group, at once if its processes are gone, else as soon as they are: memory takes time to be freed."""
        assert self.groups is not None
        if lease_id not in self._removals and not self.groups.end(lease_id):
            removing = self._remove_when_empty(self.groups, lease_id)
            self._removals[lease_id] = asyncio.get_running_loop().create_task(removing)

    async def _remove_when_empty(self, groups: ControlGroups, lease_id: str) -> None:
        for _ in range(_REMOVAL_TRIES):
            await asyncio.sleep(_REMOVAL_INTERVAL_S)
            if groups.end(lease_id):
                del self._removals[lease_id]
                return
        del self._removals[lease_id]
        self._log.warning("Processes of lease %s cannot be ended: %s", lease_id, groups.path(lease_id))

    def _of(self, spec: WorkerSpec) -> Limits:
        return limits_of(spec.devices, self._machine_mib, self._host_memory_mib, self._disk_mib)

    # -- the watch

    async def _watch(self) -> None:
        measured_at = 0.0
        while True:
            await asyncio.sleep(INTERVAL_S)
            workers = dict(self._workers())
            lent = {lease_id: self._lent_mib(lease_id) << 20 for lease_id in workers}
            directories = time.monotonic() - measured_at >= _DIRECTORY_INTERVAL_S
            if directories:
                measured_at = time.monotonic()
            try:
                await asyncio.to_thread(self._look, workers, lent, directories)
            except Exception:
                self._log.exception("The workers' use of host memory cannot be measured")

    def _look(self, workers: Mapping[str, WorkerAddress], lent: Mapping[str, int], directories: bool) -> None:
        groups = measure.members([worker.pid for worker in workers.values()])
        for lease_id, worker in workers.items():
            limits, pids = self._limits.get(lease_id), groups[worker.pid]
            if limits is None or not pids or not processes.lives(worker.pid, worker.created):
                continue
            state = worker_files.path(self._folder, lease_id)
            own = worker_files.own_directory(state)
            taken = measure.taken(pids, own, state)
            if directories:
                taken = measure.with_directory(taken, own)
                taken = measure.with_directory(taken, worker_files.compile_directory(state))
            taken = Taken(
                # No more than its slices have, whatever it has asked the arena for.
                max(0, taken.memory_bytes - min(lent[lease_id], limits.slices_mib << 20)),
                taken.disk_bytes,
                taken.tasks,
                taken.files,
                taken.depth,
            )
            why = excess(limits, taken)
            if why:
                self._end(lease_id, worker, why)

    def _end(self, lease_id: str, worker: WorkerAddress, why: str) -> None:
        if not processes.lives(worker.pid, worker.created):
            return  # it ended while it was measured
        self._reasons[lease_id] = why
        self._log.warning("Ending the worker of lease %s (pid %d): %s", lease_id, worker.pid, why)
        # The whole group at once: what it goes on to start cannot outrun that.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        processes.send(worker.pid, worker.created, signal.SIGKILL)
