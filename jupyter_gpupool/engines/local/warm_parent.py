"""The warm parent: the process (:mod:`.zygote`) that has imported PyTorch, and that workers are forked from."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict
from logging import LoggerAdapter
from typing import Any

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import WorkerAddress
from jupyter_gpupool.transport.specs import WorkerSpec

from . import worker_secrets
from .environment import Environment
from .inherited_variables import without_secrets
from .worker_certificate import new_certificate
from .workers import LocalWorkers

#: The module of the process.
ZYGOTE = "jupyter_gpupool.engines.local.zygote"
#: The largest message on the control socket, in bytes.
_MAX_MESSAGE_BYTES = 1 << 20
#: How long the parent may take to end after its socket was closed, in seconds.
_EXIT_TIMEOUT_S = 10.0


class WarmParent:
    """Starts the parent, replaces it when it dies, and asks it for workers.

    ``runs``: the environment that it runs in. ``folder``: of the workers' state files.
    ``start_timeout_s``: how long it may take to import PyTorch, and how long a worker may take to start.
    ``address_of``: the address of a worker, from what the parent reports of it. ``secure``: whether workers speak TLS,
    each with a certificate of its own. ``sandbox``: whether workers are shut
    in, as :class:`~jupyter_gpupool.engines.worker_options.WorkerSandbox` has it. ``bounds``: what a worker enters;
    ``unbound`` is called for one that did not start.
    """

    def __init__(
        self,
        folder: str,
        *,
        persistent: bool,
        start_timeout_s: float,
        workers: LocalWorkers,
        address_of: Callable[[Mapping[str, Any]], WorkerAddress],
        log: Any,
        runs: Environment,
        secure: bool = False,
        sandbox: str = "off",
        bounds: Callable[[WorkerSpec], dict[str, Any]] = lambda spec: {},
        unbound: Callable[[str], object] = lambda lease_id: None,
    ) -> None:
        self._runs = runs
        self._secure = secure
        self._sandbox = sandbox
        self._bounds, self._unbound = bounds, unbound
        self._folder = folder
        self._persistent = persistent
        self._start_timeout_s = start_timeout_s
        self._workers = workers
        self._address_of = address_of
        self._log: LoggerAdapter[Any] = log
        self.process: subprocess.Popen[bytes] | None = None
        #: The socket to the parent; None while there is none.
        self.control: socket.socket | None = None
        #: Why no worker can be started, in one line; empty if nothing is wrong.
        self.failure = ""
        #: why its workers lack a layer of their sandbox, empty if they have it, by "emulated" and "real" and layer
        self.sandbox: Mapping[str, Mapping[str, str]] = {}
        self._ready: asyncio.Future[int] | None = None
        self._starting: dict[str, asyncio.Future[WorkerAddress]] = {}
        self._children: set[str] = set()  # the leases whose workers it was asked for
        #: Whether no more workers are to be started.
        self.is_stopping = False

    @property
    def is_warm(self) -> bool:
        """Whether the next worker starts at once."""
        ready = self._ready
        return ready is not None and ready.done() and not ready.exception() and self.control is not None

    @property
    def is_busy(self) -> bool:
        """Whether it has a worker, or is asked for one."""
        return bool(self._children)

    def start(self) -> None:
        """Start the process. Raises EngineError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(theirs.fileno()), str(os.getpid()), self._folder, *self._runs.options()]
        arguments.append(f"--sandbox={self._sandbox}")
        if self._persistent:
            arguments.append("--persistent")
        try:
            self.process = subprocess.Popen(
                processes.command(ZYGOTE, *arguments, python=self._runs.python),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a reader of the pool's output must not wait for its workers
                env=without_secrets(os.environ),
                start_new_session=True,  # Ctrl-C in the pool's terminal is for the pool alone
            )
        except OSError as e:
            ours.close()
            raise EngineError(f"no process can be started for the workers: {e.strerror}") from e
        finally:
            theirs.close()
        ours.setblocking(False)
        self.control = ours
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(lambda f: f.exception())  # retrieved, so that asyncio does not log it
        loop.add_reader(ours.fileno(), self._read, ours)

    async def until_warm(self) -> socket.socket:
        """Returns its socket when the next worker starts at once. Raises EngineError."""
        if self.is_stopping:
            raise EngineError("the pool is stopping")
        if self.control is None:
            self.start()  # what was missing may have been installed meanwhile
        assert self._ready is not None
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), self._start_timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as e:
            raise EngineError(f"PyTorch could not be imported within {self._start_timeout_s:g} s") from e
        if self.control is None:
            raise EngineError("the warm parent of the workers died; ask again")
        return self.control

    async def start_worker(self, spec: WorkerSpec, host: str, port: int = 0) -> WorkerAddress:
        """Fork a worker that listens on ``host``, on that port or any (0). Raises EngineError."""
        self._children.add(spec.lease_id)
        try:
            return await self._start_worker(spec, host, port)
        except BaseException:
            self._children.discard(spec.lease_id)
            self._unbound(spec.lease_id)
            raise

    async def _start_worker(self, spec: WorkerSpec, host: str, port: int) -> WorkerAddress:
        control = await self.until_warm()
        answer: asyncio.Future[WorkerAddress] = asyncio.get_running_loop().create_future()
        self._starting[spec.lease_id] = answer
        try:
            known = asdict(worker_secrets.without(spec))
            asked = {"start": known, "host": host, "port": port, "bounds": self._bounds(spec)}
            certificate = new_certificate(f"worker of {spec.lease_id}") if self._secure else b""
            descriptors = worker_secrets.hand_over(spec, certificate)
            try:
                socket.send_fds(control, [json.dumps(asked).encode()], descriptors)
            finally:
                worker_secrets.close(descriptors)
            return await asyncio.wait_for(answer, self._start_timeout_s)
        except (OSError, TimeoutError, asyncio.TimeoutError) as e:
            why = str(e) or "the warm parent does not answer"
            raise EngineError(f"no worker could be started: {why}") from e
        finally:
            self._starting.pop(spec.lease_id, None)

    async def stop(self) -> None:
        """Close its socket; it then ends, unless it is persistent and has workers."""
        if self.control is not None:
            self._close(self.control)
        if self.process is not None and not self._persistent:
            child, self.process = self.process, None
            try:
                await asyncio.to_thread(child.wait, _EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                await asyncio.to_thread(child.wait)

    def _read(self, control: socket.socket) -> None:
        while True:
            try:
                packet = control.recv(_MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._on_death(control)
                return
            self._on_message(json.loads(packet))

    def _on_message(self, message: dict[str, Any]) -> None:
        assert self._ready is not None
        if "ready" in message and not self._ready.done():
            self.failure = ""
            self.sandbox = message.get("sandbox", {})
            self._ready.set_result(message["ready"])
            for operator, why in message.get("operators", {}).items():
                if why:
                    self._log.warning("%s is allowed, and cannot be used: %s", operator, why)
        elif "unusable" in message and not self._ready.done():
            advice = message.get("advice", "install it there: pip install 'jupyter_gpupool[torch]'")
            self.failure = f"{message['unusable']}; {advice}"
            self._ready.set_exception(EngineError(self.failure))
        elif "started" in message:
            lease_id = message["started"]
            worker = self._address_of(message)
            self._workers.add(lease_id, worker)
            waiting = self._starting.get(lease_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(worker)
            else:  # too late
                processes.send(worker.pid, worker.created, signal.SIGKILL)
        elif "failed" in message:
            waiting = self._starting.get(message["failed"])
            if waiting is not None and not waiting.done():
                waiting.set_exception(EngineError(f"no worker could be started: {message['why']}"))
        elif "ended" in message:
            self._children.discard(message["ended"])
            self._workers.remove(message["ended"], message["code"])

    def _on_death(self, control: socket.socket) -> None:
        """The parent ended, and embedded workers with it. It is replaced now if it had ever been warm."""
        was_warm = self.is_warm
        self._close(control)
        assert self._ready is not None
        if not self._ready.done():
            self.failure = "the process that starts workers died while it imported PyTorch"
            self._ready.set_exception(EngineError(self.failure))
        for waiting in self._starting.values():
            if not waiting.done():
                waiting.set_exception(EngineError("the warm parent of the workers died; ask again"))
        self._workers.adopt_all(self._children, kill=not self._persistent)
        self._children.clear()
        if self.process is not None:
            asyncio.get_running_loop().run_in_executor(None, self.process.wait)  # leaves no zombie
        if was_warm:
            self._log.warning("The warm parent of the workers died; starting another one")
            self.start()

    def _close(self, control: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(control.fileno())
        control.close()
        if control is self.control:
            self.control = None
