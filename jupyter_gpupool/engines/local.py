"""Workers on this machine: one process per lease, forked from a warm parent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Bool, Enum, Float, Int, Unicode, default
from traitlets.config import LoggingConfigurable

from ..devices import discover
from ..devices.emulated import DEFAULT_COUNT, DEFAULT_MEMORY_MIB, DEFAULT_NAME
from ..devices.host import read as read_host
from ..devices.readings import ServerReading
from ..devices.watch import Watch, Xids
from ..pool.errors import EngineFailure, InUse
from ..pool.interfaces import ServersChanged, WorkerExit
from ..pool.models import Lease, Server, WorkerAddress, WorkerUsage
from ..remote import specs
from . import process, records
from .data_port import DataPort
from .ends import end_of

#: How long a worker that is told to end may take to say goodbye, in seconds.
_GRACE_S = 2.0
#: How long a worker may take to keep to other limits, in seconds; it looks several times a second.
_OBEY_S = 10.0


class LocalEngine(LoggingConfigurable):
    """The engine of a pool that has one GPU server: this machine."""

    server_name = Unicode(help="Name of this GPU server. Default: the host's name.").tag(config=True)
    host = Unicode("127.0.0.1", help="Address that workers listen on and clients reach them by.").tag(
        config=True
    )
    certfile = Unicode(
        help="Certificate (PEM) of this GPU server. With it workers speak TLS 1.3 only, all behind `data_port`."
    ).tag(config=True)
    keyfile = Unicode(help="The certificate's private key (PEM).").tag(config=True)
    data_host = Unicode(help="Address that the data port listens on. Default: all of this machine.").tag(
        config=True
    )
    data_port = Int(
        0, min=0, max=65535, help="The one port of all workers with TLS; 0 takes a free one."
    ).tag(config=True)
    emulate = Enum(
        ["auto", "always", "never"],
        "auto",
        help="Offer emulated GPUs: `auto` where NVML finds no GPU, `always` (only those), or `never`.",
    ).tag(config=True)
    emulated_count = Int(DEFAULT_COUNT, min=1, help="How many emulated GPUs.").tag(config=True)
    emulated_name = Unicode(DEFAULT_NAME, help="Name of the emulated GPUs.").tag(config=True)
    emulated_memory_mib = Int(DEFAULT_MEMORY_MIB, min=1, help="Memory of each emulated GPU, in MiB.").tag(
        config=True
    )
    persistent = Bool(False, help="Workers outlive a pool that is killed, and its successor finds them.").tag(
        config=True
    )
    pool_id = Unicode(help="Tells the workers of this pool from those of another one on this machine.")
    run_dir = Unicode(
        help="Directory of the workers' state files, of one pool alone. Default: below Jupyter's runtime directory."
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
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[int] | None = None
        self._failure = ""
        self._health: Watch | None = None
        self._real = False
        self._stopping = False
        self._starting: dict[str, asyncio.Future[WorkerAddress]] = {}
        self._workers: dict[str, WorkerAddress] = {}
        self._gone: dict[str, asyncio.Event] = {}
        self._watched: dict[str, int] = {}
        self._on_exit: WorkerExit = lambda lease_id, state, reason: None

    # -- Engine

    async def start(self, on_exit: WorkerExit, on_servers: ServersChanged = lambda servers: None) -> None:
        """Raises EngineFailure where there can be no workers. This machine is the one server for good."""
        if sys.platform != "linux":
            raise EngineFailure("GPU workers run on Linux only; name a pool on a GPU server with GPUPOOL_URL")
        self._on_exit = on_exit
        self._stopping = False
        try:
            Path(self.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise EngineFailure(f"{self.run_dir} cannot be made for the workers: {e.strerror}") from None
        if self.certfile:
            self._door = DataPort(self.data_host, self.data_port, self.run_dir, self.persistent, self.log)
            await self._door.start()
        self._start_parent()
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
        """What this machine last said of its health."""
        latest = self._health.latest if self._health is not None else None
        return [] if latest is None else [latest]

    async def start_worker(self, lease: Lease, first: int = 0) -> WorkerAddress:
        """``first``: the number of the lease's first slice here, where it has others on other servers."""
        control = await self._parent_is_ready()
        answer: asyncio.Future[WorkerAddress] = asyncio.get_running_loop().create_future()
        self._starting[lease.id] = answer
        message = {"start": asdict(self._spec(lease, first)), "host": self.host}
        try:
            control.send(json.dumps(message).encode())
            return await asyncio.wait_for(answer, self.start_timeout_s)
        except (OSError, TimeoutError, asyncio.TimeoutError) as e:
            why = str(e) or "the warm parent does not answer"
            raise EngineFailure(f"no worker could be started: {why}") from e
        finally:
            self._starting.pop(lease.id, None)

    async def stop_worker(self, lease_id: str) -> None:
        worker = self._workers.get(lease_id)
        if worker is None:
            return
        gone = self._gone[lease_id]
        for sig, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 30.0)):
            process.send(worker.pid, worker.created, sig)
            try:
                await asyncio.wait_for(gone.wait(), patience)
                return
            except (TimeoutError, asyncio.TimeoutError):
                continue
        self.log.error("The worker of lease %s (pid %d) cannot be killed", lease_id, worker.pid)

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        gone = self._gone.get(lease_id)
        if gone is None:
            raise EngineFailure(f"lease {lease_id} has no worker that could be told")
        file = records.path(self.run_dir, lease_id)
        try:
            in_use = await records.obeyed(file, limits, gone, _OBEY_S)
        except OSError as e:
            raise EngineFailure(f"{file.parent} cannot be written: {e.strerror}") from None
        if in_use is None:
            raise EngineFailure(f"the worker of lease {lease_id} does not answer; ask again")
        for uuid, mib in in_use.items():
            number = list(limits).index(uuid)
            raise InUse(
                f"slice {number} (cuda:{number}) has {mib} MiB in use and cannot be made smaller than that; "
                "delete tensors, or move them to the CPU"
            )

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        """Also says (on_exit) how those ended that ended while no pool ran. Raises EngineFailure."""
        if not await records.until_recorded(self.run_dir, 30.0):
            raise EngineFailure("the workers of this pool's predecessor cannot be counted; start it again")
        wanted = {lease.id: lease for lease in leases}
        for file in list(records.files(self.run_dir)):
            state = records.read(file)
            if state is None:
                records.remove(file)
                continue
            lease_id = state["lease"]
            worker = self._address(state)
            lease = wanted.get(lease_id)
            if not process.lives(worker.pid, worker.created):
                records.remove(file)
                if lease is not None and state.get("code") is not None:
                    self._on_exit(lease_id, *end_of(state["code"]))
            elif lease is not None:
                # Clients know it by the address that it was started with.
                known = lease.worker is not None and lease.worker.pid == worker.pid
                self._take_over(lease_id, lease.worker if known and lease.worker else worker)
            else:
                self.log.warning(
                    "Ending the worker of lease %s (pid %d), which nobody holds", lease_id, worker.pid
                )
                await self._end_orphan(lease_id, worker)
                records.remove(file)
        for lease in leases:  # the ledger remembers those whose files were lost
            held_by = lease.worker
            if held_by is None or lease.id in self._workers:
                continue
            if process.lives(held_by.pid, held_by.created):
                self._take_over(lease.id, held_by)
        return dict(self._workers)

    def usage(self) -> dict[str, WorkerUsage]:
        found = {}
        for lease_id in self._workers:
            use = (records.read(records.path(self.run_dir, lease_id)) or {}).get("usage")
            if use:
                found[lease_id] = WorkerUsage(use["allocated_bytes"], use["busy"], use["sessions"], use.get("held_at"))
        return found

    async def stop(self) -> None:
        """End the engine and, unless they are persistent, its workers."""
        self._stopping = True
        if self._health is not None:
            self._health.stop()
        if not self.persistent:
            await asyncio.gather(*(self.stop_worker(lease_id) for lease_id in list(self._workers)))
        for lease_id in list(self._watched):
            self._unwatch(lease_id)
        self._workers.clear()
        self._gone.clear()
        if self._control is not None:
            self._hang_up(self._control)
        if self._door is not None:
            await self._door.stop()
        if self._process is not None and not self.persistent:
            child, self._process = self._process, None
            try:
                await asyncio.to_thread(child.wait, 10)
            except subprocess.TimeoutExpired:
                child.kill()
                await asyncio.to_thread(child.wait)

    @property
    def listens_on(self) -> int:
        """The data port's number; 0 where every worker has a port of its own."""
        return self._door.port if self._door is not None else 0

    @property
    def warm(self) -> bool:
        """Whether the next worker starts at once."""
        ready = self._ready
        return ready is not None and ready.done() and not ready.exception() and self._control is not None

    @property
    def failure(self) -> str:
        """Why no worker can be started, one line; empty while nothing speaks against it."""
        return self._failure

    # -- the warm parent

    def _start_parent(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(theirs.fileno()), str(os.getpid()), self.run_dir]
        if self.persistent:
            arguments.append("--persistent")
        try:
            self._process = subprocess.Popen(
                process.command("jupyter_gpupool.engines.zygote", *arguments),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # whoever reads the pool's must not wait for its workers
                env={k: v for k, v in os.environ.items() if k != "GPUPOOL_LEASE"},
                start_new_session=True,  # a Ctrl-C in the pool's terminal is the pool's business
            )
        except OSError as e:
            ours.close()
            raise EngineFailure(f"no process can be started for the workers: {e.strerror}") from e
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(lambda f: f.exception())  # whoever needs it is told
        loop.add_reader(ours.fileno(), self._listen, ours)

    async def until_warm(self) -> None:
        """Returns when the next worker starts at once. Raises EngineFailure."""
        await self._parent_is_ready()

    async def _parent_is_ready(self) -> socket.socket:
        if self._stopping:
            raise EngineFailure("the pool is stopping")
        if self._control is None:
            self._start_parent()  # what was missing may have been installed meanwhile
        assert self._ready is not None
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), self.start_timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as e:
            raise EngineFailure(f"PyTorch could not be imported within {self.start_timeout_s:g} s") from e
        if self._control is None:
            raise EngineFailure("the warm parent of the workers died; ask again")
        return self._control

    def _listen(self, control: socket.socket) -> None:
        while True:
            try:
                packet = control.recv(1 << 20)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._lose_parent(control)
                return
            self._hear(json.loads(packet))

    def _hear(self, message: dict[str, Any]) -> None:
        assert self._ready is not None
        if "ready" in message and not self._ready.done():
            self._failure = ""
            self._ready.set_result(message["ready"])
        elif "unusable" in message and not self._ready.done():
            self._failure = f"{message['unusable']}; install it there: pip install 'jupyter_gpupool[torch]'"
            self._ready.set_exception(EngineFailure(self._failure))
        elif "started" in message:
            lease_id = message["started"]
            worker = self._address(message)
            self._remember(lease_id, worker)
            waiting = self._starting.get(lease_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(worker)
            else:  # it came too late
                process.send(worker.pid, worker.created, signal.SIGKILL)
        elif "failed" in message:
            waiting = self._starting.get(message["failed"])
            if waiting is not None and not waiting.done():
                waiting.set_exception(EngineFailure(f"no worker could be started: {message['why']}"))
        elif "ended" in message:
            self._forget(message["ended"], message["code"])

    def _hang_up(self, control: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(control.fileno())
        control.close()
        if control is self._control:
            self._control = None

    def _lose_parent(self, control: socket.socket) -> None:
        """The warm parent ended; embedded workers ended with it. It is replaced now if it had ever been warm."""
        was_warm = self.warm
        self._hang_up(control)
        assert self._ready is not None
        if not self._ready.done():
            self._failure = "the process that starts workers died while it imported PyTorch"
            self._ready.set_exception(EngineFailure(self._failure))
        for waiting in self._starting.values():
            if not waiting.done():
                waiting.set_exception(EngineFailure("the warm parent of the workers died; ask again"))
        for lease_id, worker in list(self._workers.items()):
            if lease_id in self._watched:
                continue
            if not self.persistent:
                process.send(worker.pid, worker.created, signal.SIGKILL)
            self._watch(lease_id, worker)
        if self._process is not None:
            asyncio.get_running_loop().run_in_executor(None, self._process.wait)  # no zombie is left
        if was_warm:
            self.log.warning("The warm parent of the workers died; starting another one")
            self._start_parent()

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
            self.certfile,
            self.keyfile,
        )

    def _address(self, state: Mapping[str, Any]) -> WorkerAddress:
        """Of a worker that said so of itself; one behind the data port has no port of its own."""
        port = self._door.port if self._door is not None else state["port"]
        return WorkerAddress(self.host, port, state["pid"], state["created"])

    def _remember(self, lease_id: str, worker: WorkerAddress) -> None:
        self._workers[lease_id] = worker
        self._gone[lease_id] = asyncio.Event()

    def _take_over(self, lease_id: str, worker: WorkerAddress) -> None:
        self._remember(lease_id, worker)
        self._watch(lease_id, worker)

    async def _end_orphan(self, lease_id: str, worker: WorkerAddress) -> None:
        if not await process.kill(worker.pid, worker.created, 10.0):
            self.log.error("The worker of lease %s (pid %d) cannot be killed", lease_id, worker.pid)

    def _forget(self, lease_id: str, code: int | None) -> None:
        if self._workers.pop(lease_id, None) is None:
            return
        self._unwatch(lease_id)
        file = records.path(self.run_dir, lease_id)
        if code is None:
            code = (records.read(file) or {}).get("code")
        records.remove(file)
        self._gone.pop(lease_id).set()
        self._on_exit(lease_id, *end_of(code))

    def _watch(self, lease_id: str, worker: WorkerAddress) -> None:
        """See the end of a worker that no warm parent of ours can tell us of."""
        try:
            fd = os.pidfd_open(worker.pid)
        except OSError:
            self._forget(lease_id, None)
            return
        self._watched[lease_id] = fd
        asyncio.get_running_loop().add_reader(fd, self._forget, lease_id, None)
        if not process.lives(worker.pid, worker.created):
            self._forget(lease_id, None)

    def _unwatch(self, lease_id: str) -> None:
        fd = self._watched.pop(lease_id, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
