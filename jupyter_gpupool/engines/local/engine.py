"""Workers on this machine: one process for each lease, forked from a warm parent."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Float, Int, Unicode, default
from traitlets.config import LoggingConfigurable

from jupyter_gpupool.core import processes, torch_release
from jupyter_gpupool.core.engine import ServersChanged, WorkerExit, WorkerReplaced, WorkerState
from jupyter_gpupool.core.errors import EngineError, SliceInUse
from jupyter_gpupool.core.models import Lease, LeaseState, Server, WorkerAddress, WorkerUsage
from jupyter_gpupool.core.readings import ServerReading
from jupyter_gpupool.engines.environment_records import OWN, default_folder
from jupyter_gpupool.engines.worker_options import (
    EmulatedGPUs,
    WorkerBounds,
    WorkerEnvironments,
    WorkerParking,
    WorkerPort,
    WorkerSandbox,
)
from jupyter_gpupool.gpus import discover
from jupyter_gpupool.gpus.emulated import DEFAULT_COUNT
from jupyter_gpupool.gpus.health.host_reader import read as read_host
from jupyter_gpupool.gpus.health.monitor import Watch, Xids
from jupyter_gpupool.transport import specs

from . import worker_files
from .bounds.bounds import Bounds
from .data_port import DataPort
from .environment import Environment
from .environments import Environments
from .exit_codes import end_of
from .linking import Linking
from .moving import Moving
from .parking import Parking
from .replacement import Replacements
from .warm_parent import WarmParent
from .workers import LocalWorkers

#: How long a worker may take to apply other limits, in seconds; it checks several times a second.
_OBEY_TIMEOUT_S = 10.0
#: How long the workers of an earlier pool may take to write their state files, in seconds.
_RECORD_TIMEOUT_S = 30.0
#: How long a worker without a lease may take to die, in seconds.
_ORPHAN_TIMEOUT_S = 10.0


class LocalEngine(
    EmulatedGPUs,
    WorkerPort,
    WorkerParking,
    WorkerSandbox,
    WorkerBounds,
    WorkerEnvironments,
    LoggingConfigurable,
):
    """The engine of a pool that has one GPU server: this machine."""

    server_name = Unicode(help="Name of this GPU server. Default: the host's name.").tag(config=True)
    host = Unicode("127.0.0.1", help="Address that workers listen on and clients reach them by.").tag(
        config=True
    )
    data_host = Unicode(help="Address that the data port listens on. Default: all of this machine.").tag(
        config=True
    )
    emulated_count = Int(DEFAULT_COUNT, min=1, help="How many emulated GPUs.").tag(config=True)
    pool_id = Unicode(
        help="Distinguishes the workers of this pool from those of another pool on this machine."
    )
    run_dir = Unicode(
        help="Directory of the workers' state files, for one pool only. Default: below Jupyter's runtime directory."
    ).tag(config=True)
    attach_timeout_s = Float(4.0, min=0.1, help="Seconds a worker waits for its lease's holder.").tag(
        config=True
    )
    start_timeout_s = Float(120.0, min=1.0, help="Seconds the warm parent may take to import PyTorch.").tag(
        config=True
    )

    @default("server_name")
    def _default_server_name(self) -> str:
        return socket.gethostname()

    @default("run_dir")
    def _default_run_dir(self) -> str:
        name = hashlib.sha256(self.pool_id.encode()).hexdigest()[:16]
        return str(Path(jupyter_runtime_dir()) / "gpupool" / f"workers-{name}")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._door: DataPort | None = None
        self._health: Watch | None = None
        self._real = False
        self._workers = LocalWorkers(self.run_dir, self.log)
        self._parking = Parking(self.run_dir, self.clean_after_s, self.log)
        self._arriving: dict[str, tuple[Lease, int]] = {}
        #: by which the workers of a lease on other servers know the one here
        self._peer_names: dict[str, str] = {}
        self.linking = Linking(self._parking.channel, bool(self.certfile), self.log)
        self._parking.on_link = self.linking.on_asked
        self.moving = Moving(self._parking, self._workers, bool(self.certfile), self._has_arrived)
        self._bounds = Bounds(
            self.run_dir,
            host_memory_mib=self.host_memory_mib,
            disk_mib=self.worker_disk_mib,
            workers=self._workers.addresses,
            lent_mib=self._parking.lent_mib,
            log=self.log,
        )
        self._replacements = Replacements(self._start_again, self.log)
        own = Environment(OWN, "", torch_release.installed(), tuple(self.operators.get(OWN, ())))
        self._parent = self._parent_of(own)
        self._environments = Environments(
            self._parent,
            own,
            self._parent_of,
            idle_s=self.environment_idle_s,
            folder=self.environments_dir or default_folder(),
            log=self.log,
        )

    def _parent_of(self, runs: Environment) -> WarmParent:
        return WarmParent(
            self.run_dir,
            persistent=self.persistent,
            start_timeout_s=self.start_timeout_s,
            workers=self._workers,
            address_of=self._address,
            log=self.log,
            runs=runs,
            secure=bool(self.certfile),
            sandbox=self.sandbox,
            bounds=self._bounds.admit,
            unbound=self._bounds.ended,
        )

    # -- Engine

    async def start(self, on_exit: WorkerExit, on_servers: ServersChanged = lambda servers: None) -> None:
        """Start what workers need. Raises EngineError if there can be no workers. The servers never change."""
        if sys.platform != "linux":
            raise EngineError("GPU workers run only on Linux. Set GPUPOOL_URL to use a pool on a GPU server.")

        def left(lease_id: str) -> None:
            self._parking.ended(lease_id)
            self.linking.forget(lease_id)
            self._peer_names.pop(lease_id, None)
            self._replacements.forget(lease_id)
            self._arriving.pop(lease_id, None)

        def ended(lease_id: str, state: LeaseState, reason: str) -> None:
            left(lease_id)
            on_exit(lease_id, state, reason)

        self._workers.on_exit = self._replacements.on_exit = ended
        self._workers.on_left = left
        self._workers.replace = self._replace
        self._workers.excess = self._bounds.ended
        self._parent.is_stopping = False
        try:
            Path(self.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise EngineError(
                f"the workers' directory {self.run_dir} cannot be created: {e.strerror}"
            ) from None
        if self.certfile:
            self._door = DataPort(self.data_host, self.data_port, self.run_dir, self.persistent, self.log)
            await self._door.start()
        await self._parking.start(self.park_memory_mib, self._workers.addresses)
        self._bounds.start()
        self._parent.start()
        await self._environments.start(self.environments, self.operators)
        self._health = Watch(self._read)
        self._health.start()

    def _read(self, xids: Xids) -> ServerReading:
        folders, real = [self.run_dir], self._real
        return read_host(
            self.server_name, folders=folders, address=self.host, driver_expected=real, xids=xids
        )

    async def servers(self) -> Sequence[Server]:
        gpus = discover(
            self.server_name,
            cast(Literal["auto", "always", "never"], self.emulate),
            count=self.emulated_count,
            name=self.emulated_name,
            memory_mib=self.emulated_memory_mib,
        )
        self._real = any(not gpu.emulated for gpu in gpus)
        return [Server(self.server_name, self.host, gpus)]

    def readings(self) -> Sequence[ServerReading]:
        """The last reading of this machine's health, if there is one."""
        latest = self._health.latest if self._health is not None else None
        if latest is None:
            return []
        sandbox = self._parent.sandbox.get("real" if self._real else "emulated")
        return [replace(latest, sandbox=sandbox, bounds=dict(self._bounds.missing))]

    async def start_worker(self, lease: Lease, first: int = 0) -> WorkerAddress:
        """``first``: the number of the lease's first slice here, if it has others on other servers."""
        worker = await self._environments.start_worker(lease, self._spec(lease, first), self.host)
        self._replacements.remember(lease, first)
        return worker

    async def receive_worker(self, lease: Lease, first: int = 0) -> WorkerAddress:
        """Start a worker to which another one of the lease is to send everything, see :mod:`.moving`."""
        spec = replace(self._spec(lease, first), awaits_state=True)
        worker = await self._environments.start_worker(lease, spec, self.host)
        self._arriving[lease.id] = lease, first
        return worker

    def _has_arrived(self, lease_id: str) -> None:
        arriving = self._arriving.pop(lease_id, None)
        if arriving is not None:
            self._replacements.remember(*arriving)

    async def stop_worker(self, lease_id: str) -> None:
        await self._replacements.until_done(lease_id)
        await self._workers.stop(lease_id)

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        gone = self._workers.gone(lease_id)
        if gone is None:
            raise EngineError(f"lease {lease_id} has no worker, so that its slices cannot be resized")
        file = worker_files.path(self.run_dir, lease_id)
        try:
            in_use = await worker_files.obeyed(file, limits, gone, _OBEY_TIMEOUT_S)
        except OSError as e:
            raise EngineError(f"{file.parent} cannot be written: {e.strerror}") from None
        if in_use is None:
            raise EngineError(f"the worker of lease {lease_id} does not answer; ask again")
        if not in_use:
            resized = self._replacements.resize(lease_id, limits)
            if resized is not None:
                self._bounds.follow(self._spec(resized))
        for uuid, mib in in_use.items():
            number = list(limits).index(uuid)
            raise SliceInUse(
                f"slice {number} (cuda:{number}) has {mib} MiB in use and cannot be made smaller than that; "
                "delete tensors, or move them to the CPU"
            )

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        """Take over the workers that still run, and end those without a lease.

        Calls ``on_exit`` for workers that ended while no pool ran. Raises EngineError.
        """
        if not await worker_files.until_recorded(self.run_dir, _RECORD_TIMEOUT_S):
            raise EngineError(
                "the workers of the pool that ran before cannot be counted; start the pool again"
            )
        self._workers.delete(*worker_files.put_aside(self.run_dir))
        wanted = {lease.id: lease for lease in leases}
        for file in list(worker_files.files(self.run_dir)):
            state = worker_files.read(file)
            if state is None:
                self._workers.delete(worker_files.forget(file))
                continue
            lease_id = state["lease"]
            worker = self._address(state)
            lease = wanted.get(lease_id)
            if not processes.lives(worker.pid, worker.created):
                self._workers.delete(worker_files.forget(file))
                if lease is not None and state.get("code") not in (None, specs.EXIT_MOVED):
                    self._workers.on_exit(lease_id, *end_of(state["code"]))
            elif lease is not None:
                # Clients use the address that it was started with.
                known = lease.worker is not None and lease.worker.pid == worker.pid
                self._workers.adopt(lease_id, lease.worker if known and lease.worker else worker)
            else:
                self.log.warning(
                    "Ending the worker of lease %s (pid %d): the lease is not live", lease_id, worker.pid
                )
                await self._end_orphan(lease_id, worker)
                self._workers.delete(worker_files.forget(file))
        for lease in leases:  # the ledger has those whose files were lost
            held_by = lease.worker
            if held_by is None or self._workers.gone(lease.id) is not None:
                continue
            if processes.lives(held_by.pid, held_by.created):
                self._workers.adopt(lease.id, held_by)
        found = self._workers.addresses()
        for lease_id in found:
            self._replacements.remember(wanted[lease_id])
            self._bounds.follow(self._spec(wanted[lease_id]))
        self._bounds.settle(set(found))
        if self._parking.arena is not None:
            await self._parking.adopt(found)
        return self._workers.addresses()

    def usage(self) -> dict[str, WorkerUsage]:
        return self._workers.usage()

    async def stop(self) -> None:
        """End the engine and, unless they are persistent, its workers."""
        self._parent.is_stopping = True
        if self._health is not None:
            self._health.stop()
        await self.linking.stop()
        await self._bounds.stop()
        await self._replacements.cancel_all()
        if not self.persistent:
            await self._workers.stop_all()
        self._workers.forget_all()
        await self._parking.stop()
        await self._environments.stop()
        await self._parent.stop()
        if self._door is not None:
            await self._door.stop()

    # -- replacing

    def on_replaced(self, replaced: WorkerReplaced) -> None:
        """Call ``replaced`` for each worker that has taken the place of one that ended by what it computed."""
        self._replacements.on_replaced = replaced

    def _replace(self, lease_id: str, worker: WorkerAddress, code: int | None) -> bool:
        if self._parent.is_stopping or lease_id in self._parking.parked:
            return False  # what is parked is all that there is of such a lease
        if not self._replacements.begin(lease_id, worker, code):
            return False
        self._parking.ended(lease_id)
        return True

    async def _start_again(self, lease: Lease, first: int, port: int) -> WorkerAddress:
        # Its holder is there, and may be out of reach for as long as a connection may be.
        spec = self._spec(lease, first)
        patient = replace(
            spec,
            attach_timeout_s=max(spec.attach_timeout_s, self.resume_s),
            peer_name=self._peer_names.get(lease.id, ""),
        )
        worker = await self._environments.start_worker(lease, patient, self.host, port)
        with contextlib.suppress(EngineError):  # it has ended already
            await self.linking.listen(lease.id)
        return worker

    # -- parking

    def on_wake(self, wake: Callable[[str], None]) -> None:
        """Call ``wake(lease_id)`` in the event loop's thread when a parked lease needs its GPUs."""
        self._parking.on_wake = wake

    def states(self) -> Mapping[str, WorkerState]:
        """Return what each worker that could be parked now would have to copy, by lease id."""
        if self._parking.arena is None:
            return {}
        parkable = set(self._workers.addresses()) - self._parking.parked
        return {
            lease_id: WorkerState(
                -(-sum(use.allocated_bytes.values()) >> 20), lease_id in self._parking.clean
            )
            for lease_id, use in self.usage().items()
            if lease_id in parkable and not self._real
        }

    def arenas(self) -> Mapping[str, int]:
        """Return the MiB of host memory for parked leases, by the server's name."""
        arena = self._parking.arena
        return {} if arena is None else {self.server_name: arena.memory_mib}

    def parked(self) -> Collection[str]:
        """Return the ids of the leases whose state is in the arena."""
        return frozenset(self._parking.parked)

    async def park_worker(self, lease: Lease) -> int:
        """Park a worker, and return the MiB that are kept for it. Raises EngineError; then the worker goes on."""
        if not all(s.emulated for s in lease.slices):
            raise EngineError(f"lease {lease.id} has real GPUs, and parking them is not supported yet")
        return await self._parking.park(lease.id)

    async def resume_worker(self, lease: Lease, first: int = 0) -> WorkerAddress:
        """Bring the parked state back, on ``lease.slices``. ``first``: as in :meth:`start_worker`. Raises
        EngineError."""
        await self._parking.resume(lease, self._spec(lease, first).devices)
        address = self._workers.addresses().get(lease.id)
        if address is None:
            raise EngineError(f"the worker of lease {lease.id} has ended")
        self._replacements.remember(lease, first)
        self._bounds.follow(self._spec(lease, first))
        return address

    async def tell(self, lease_id: str, what: str, **fields: Any) -> dict[str, Any]:
        """Ask a worker for what workers of a lease on several servers do together, see transport/control.py.

        Raises EngineError with its reason.
        """
        return await self._parking.channel(lease_id).ask(what, **fields)

    async def introduce(self, lease_id: str, others: Mapping[str, WorkerAddress]) -> None:
        """Let a worker be linked to those of its lease on other servers, by their names. Raises EngineError."""
        await self.linking.introduce(lease_id, others)
        await self._learn_peer_name(lease_id)

    async def serve_arrived(self, lease_id: str) -> None:
        """Let a lease that has arrived go on here. Raises EngineError if it has not arrived whole."""
        await self.moving.serve(lease_id)
        await self._learn_peer_name(lease_id)

    async def _learn_peer_name(self, lease_id: str) -> None:
        # It is empty before a worker has arrived; one of an earlier version does not say it.
        with contextlib.suppress(EngineError):
            self._peer_names[lease_id] = (await self.tell(lease_id, "name"))["name"]

    @property
    def listens_on(self) -> int:
        """The data port's number; 0 if every worker has its own port."""
        return self._door.port if self._door is not None else 0

    @property
    def warm(self) -> bool:
        """Whether the next worker starts at once."""
        return self._parent.is_warm

    @property
    def failure(self) -> str:
        """Why no worker can be started, in one line; empty if nothing is wrong."""
        return self._parent.failure

    async def until_warm(self) -> None:
        """Returns when the next worker starts at once. Raises EngineError."""
        await self._parent.until_warm()

    # -- workers

    def _spec(self, lease: Lease, first: int = 0) -> specs.WorkerSpec:
        devices = tuple(
            specs.DeviceSpec(n, s.gpu_uuid, s.name, s.memory_mib, s.total_mib, s.emulated)
            for n, s in enumerate(lease.slices, first)
        )
        return specs.WorkerSpec(
            lease.id,
            lease.request.secret_sha256,
            devices,
            self.attach_timeout_s,
            lease.ttl_s,
            self.resume_s,
            self.window_mib,
        )

    def _address(self, state: Mapping[str, Any]) -> WorkerAddress:
        """A worker's address, from what it reports; a worker behind the data port has no port of its own."""
        port = self._door.port if self._door is not None else state["port"]
        # A worker of an earlier version does not say where it runs.
        runs_in = {name: state.get(name, "") for name in ("environment", "torch")}
        return WorkerAddress(self.host, port, state["pid"], state["created"], **runs_in)

    async def _end_orphan(self, lease_id: str, worker: WorkerAddress) -> None:
        if not await processes.kill(worker.pid, worker.created, _ORPHAN_TIMEOUT_S):
            self.log.error("The worker of lease %s (pid %d) cannot be killed", lease_id, worker.pid)
        else:
            processes.kill_group(worker.pid, worker.created)
