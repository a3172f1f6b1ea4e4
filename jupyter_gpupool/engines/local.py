"""Workers on this machine: one process per lease, forked from a warm parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Bool, Enum, Float, Int, Unicode, default
from traitlets.config import LoggingConfigurable

from ..devices import discover
from ..devices.emulated import DEFAULT_COUNT, DEFAULT_MEMORY_MIB, DEFAULT_NAME
from ..pool.errors import EngineFailure
from ..pool.interfaces import WorkerExit
from ..pool.models import Lease, LeaseState, Server, WorkerAddress, WorkerUsage
from ..remote import specs

#: How each exit code of a worker ends its lease.
_ENDS = {
    specs.EXIT_RELEASED: (LeaseState.RELEASED, "released by its holder"),
    specs.EXIT_HOLDER_LOST: (LeaseState.RELEASED, "its holder went away"),
    specs.EXIT_NEVER_ATTACHED: (LeaseState.EXPIRED, "nobody attached to it"),
    specs.EXIT_FENCED: (LeaseState.EXPIRED, "nothing was heard of its holder"),
    specs.EXIT_STOPPED: (LeaseState.RELEASED, "ended by the pool"),
}

#: How long a worker that is told to end may take to say goodbye, in seconds.
_GRACE_S = 2.0


def end_of(code: int | None) -> tuple[LeaseState, str]:
    """What a worker's exit code (minus a signal's number; None if unknown) means for its lease."""
    if code in _ENDS:
        return _ENDS[code]
    if code is None:
        return LeaseState.LOST, "its worker died"
    if code < 0:
        return LeaseState.LOST, f"its worker was killed by {signal.Signals(-code).name}"
    return LeaseState.LOST, f"its worker failed with exit code {code}"


class LocalEngine(LoggingConfigurable):
    """The engine of a pool that has one GPU server: this machine."""

    server_name = Unicode(help="Name of this GPU server. Default: the host's name.").tag(config=True)
    host = Unicode("127.0.0.1", help="Address that workers listen on and clients reach them by.").tag(
        config=True
    )
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
    run_dir = Unicode(
        help="Directory of the workers' state files. Default: below Jupyter's runtime directory."
    ).tag(config=True)
    attach_timeout_s = Float(5.0, min=0.1, help="Seconds a worker waits for its lease's holder.").tag(
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
        return str(Path(jupyter_runtime_dir()) / "gpupool" / "workers")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[int] | None = None
        self._starting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._workers: dict[str, WorkerAddress] = {}
        self._gone: dict[str, asyncio.Event] = {}
        self._watched: dict[str, int] = {}
        self._on_exit: WorkerExit = lambda lease_id, state, reason: None

    # -- Engine

    async def start(self, on_exit: WorkerExit) -> None:
        self._on_exit = on_exit
        Path(self.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._start_parent()

    async def servers(self) -> Sequence[Server]:
        gpus = discover(
            self.server_name,
            self.emulate,
            count=self.emulated_count,
            name=self.emulated_name,
            memory_mib=self.emulated_memory_mib,
        )
        return [Server(self.server_name, self.host, gpus)]

    async def start_worker(self, lease: Lease) -> WorkerAddress:
        control = await self._parent_is_ready()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._starting[lease.id] = answer
        message = {
            "start": asdict(self._spec(lease)),
            "host": self.host,
            "state": str(self._state_file(lease.id)),
        }
        try:
            control.send(json.dumps(message).encode())
            started = await asyncio.wait_for(answer, self.start_timeout_s)
        except (OSError, TimeoutError, asyncio.TimeoutError) as e:
            raise EngineFailure(
                f"no worker could be started: {e or 'the warm parent does not answer'}"
            ) from e
        finally:
            self._starting.pop(lease.id, None)
        return WorkerAddress(self.host, started["port"], started["pid"], started["created"])

    async def stop_worker(self, lease_id: str) -> None:
        worker = self._workers.get(lease_id)
        if worker is None:
            return
        gone = self._gone[lease_id]
        for sig, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 30.0)):
            _signal(worker, sig)
            try:
                await asyncio.wait_for(gone.wait(), patience)
                return
            except (TimeoutError, asyncio.TimeoutError):
                continue
        self.log.error("The worker of lease %s (pid %d) cannot be killed", lease_id, worker.pid)

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        wanted = {lease.id for lease in leases}
        for file in Path(self.run_dir).glob("*.json"):
            state = _read(file)
            worker = (
                WorkerAddress(self.host, state["port"], state["pid"], state["created"]) if state else None
            )
            if worker is None or not _alive(worker):
                # An ended worker's file says how it ended, which only a new pool need be told.
                if state and state["lease"] in wanted:
                    self.log.info("The worker of lease %s ended while no pool ran", state["lease"])
                file.unlink(missing_ok=True)
            elif state["lease"] in wanted:
                self._remember(state["lease"], worker)
                self._watch(state["lease"], worker)
            else:
                self.log.warning(
                    "Ending the worker of lease %s (pid %d), which nobody holds", state["lease"], worker.pid
                )
                _signal(worker, signal.SIGKILL)
                file.unlink(missing_ok=True)
        return dict(self._workers)

    def usage(self) -> dict[str, WorkerUsage]:
        found = {}
        for lease_id in self._workers:
            state = _read(self._state_file(lease_id))
            usage = (state or {}).get("usage")
            if usage:
                found[lease_id] = WorkerUsage(usage["allocated_bytes"], usage["busy"], usage["sessions"])
        return found

    async def stop(self) -> None:
        if not self.persistent:
            await asyncio.gather(*(self.stop_worker(lease_id) for lease_id in list(self._workers)))
        loop = asyncio.get_running_loop()
        for lease_id in list(self._watched):
            self._unwatch(lease_id)
        if self._control is not None:
            loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if self._process is not None and not self.persistent:
            process, self._process = self._process, None
            try:
                await asyncio.to_thread(process.wait, 10)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)

    @property
    def warm(self) -> bool:
        """Whether the next worker starts at once."""
        return self._ready is not None and self._ready.done() and not self._ready.exception()

    async def when_warm(self) -> None:
        """Return when the warm parent is ready. Raises EngineFailure."""
        await self._parent_is_ready()

    # -- the warm parent

    def _start_parent(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = ["--persistent"] if self.persistent else []
        environment = {k: v for k, v in os.environ.items() if k != "GPUPOOL_LEASE"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jupyter_gpupool.engines.zygote", str(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the pool's terminal is the pool's business
            )
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(lambda f: f.exception())  # whoever needs it is told
        loop.add_reader(ours.fileno(), self._listen, ours)

    async def _parent_is_ready(self) -> socket.socket:
        if self._control is None:
            raise EngineFailure("the pool is stopping")
        if self._ready is not None and self._ready.done() and self._ready.exception():
            self._start_parent()  # what was missing may have been installed meanwhile
        assert self._ready is not None
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), self.start_timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as e:
            raise EngineFailure(f"PyTorch could not be imported within {self.start_timeout_s:g} s") from e
        assert self._control is not None
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
            self._ready.set_result(message["ready"])
        elif "unusable" in message and not self._ready.done():
            why = f"{message['unusable']}; install it there with: pip install 'jupyter_gpupool[torch]'"
            self._ready.set_exception(EngineFailure(why))
        elif "started" in message:
            lease_id = message["started"]
            worker = WorkerAddress(self.host, message["port"], message["pid"], message["created"])
            self._remember(lease_id, worker)
            waiting = self._starting.get(lease_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif "failed" in message:
            waiting = self._starting.get(message["failed"])
            if waiting is not None and not waiting.done():
                waiting.set_exception(EngineFailure(f"no worker could be started: {message['why']}"))
        elif "ended" in message:
            self._forget(message["ended"], message["code"])

    def _lose_parent(self, control: socket.socket) -> None:
        """The warm parent died; embedded workers died with it. The next lease starts another one."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(control.fileno())
        control.close()
        if control is not self._control:
            return
        self.log.warning("The warm parent of the workers died; starting another one")
        failure = EngineFailure("the warm parent of the workers died; ask again")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(failure)
        for waiting in self._starting.values():
            if not waiting.done():
                waiting.set_exception(failure)
        for lease_id, worker in list(self._workers.items()):
            if lease_id in self._watched:
                continue
            if self.persistent and _alive(worker):
                self._watch(lease_id, worker)
            else:
                _signal(worker, signal.SIGKILL)
                self._forget(lease_id, None)
        if self._process is not None:
            self._process.poll()
        self._start_parent()

    # -- workers

    def _spec(self, lease: Lease) -> specs.WorkerSpec:
        devices = tuple(
            specs.DeviceSpec(n, s.gpu_uuid, s.name, s.memory_mib, s.total_mib, s.emulated)
            for n, s in enumerate(lease.slices)
        )
        return specs.WorkerSpec(
            lease.id, lease.request.secret_sha256, devices, self.attach_timeout_s, lease.ttl_s
        )

    def _state_file(self, lease_id: str) -> Path:
        return Path(self.run_dir) / f"{lease_id}.json"

    def _remember(self, lease_id: str, worker: WorkerAddress) -> None:
        self._workers[lease_id] = worker
        self._gone[lease_id] = asyncio.Event()

    def _forget(self, lease_id: str, code: int | None) -> None:
        if self._workers.pop(lease_id, None) is None:
            return
        self._unwatch(lease_id)
        file = self._state_file(lease_id)
        if code is None:
            code = (_read(file) or {}).get("code")
        file.unlink(missing_ok=True)
        self._gone.pop(lease_id).set()
        self._on_exit(lease_id, *end_of(code))

    def _watch(self, lease_id: str, worker: WorkerAddress) -> None:
        """See the end of a worker that is not this process's child's child."""
        try:
            fd = os.pidfd_open(worker.pid)
        except OSError:
            self._forget(lease_id, None)
            return
        self._watched[lease_id] = fd
        asyncio.get_running_loop().add_reader(fd, self._forget, lease_id, None)
        if not _alive(worker):
            self._forget(lease_id, None)

    def _unwatch(self, lease_id: str) -> None:
        fd = self._watched.pop(lease_id, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


def _alive(worker: WorkerAddress) -> bool:
    """Whether this very process (not another one with its number) runs."""
    try:
        process = psutil.Process(worker.pid)
        return process.create_time() == worker.created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _signal(worker: WorkerAddress, sig: int) -> None:
    if _alive(worker):
        try:
            os.kill(worker.pid, sig)
        except ProcessLookupError:
            pass  # it ended by itself just now


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
