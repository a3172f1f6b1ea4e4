"""The lease that is attached to this process, and its connections to the workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from jupyter_gpupool.core import processes
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream
from jupyter_gpupool.pytorch.client.tensor.device_memory import DeviceMemory
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.protocol.commands import SEED, SEED_BITS
from jupyter_gpupool.transport import handshake
from jupyter_gpupool.transport.resumable_connection import ResumableConnection
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec
from jupyter_gpupool.transport.tls import Connection

from . import schemas
from .dispatcher import Dispatcher
from .multi_worker import MultiWorkerDispatcher
from .resizing import ResizeOutputs


class NotAttached(RuntimeError):
    """No lease is attached to this process, or it was released."""


class ClientSession:
    """A process's connections to the workers of its lease, one on each server; made at the first operator."""

    def __init__(self, spec: AttachSpec) -> None:
        #: the whole lease, and what CUDA_VISIBLE_DEVICES leaves of it, numbered as this process sees it
        self.lease = self.spec = spec
        #: calls an operator: the one worker's dispatcher, or what chooses among several; None until connected
        self.call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self._of: dict[int, Dispatcher] = {}  # by device
        self._connecting = threading.RLock()
        self.seed = torch.initial_seed()
        #: the welcome of the first worker, see handshake.py
        self.welcome: dict[str, Any] = {}

    @property
    def connected(self) -> bool:
        """Whether the connections have been made."""
        return self.call is not None

    def connect(self) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        """Connect to every worker unless that is done, and return ``call``. Raises what the handshake raises."""
        with self._connecting:
            if self.call is None:
                device_names.refresh()
                if not self.spec.devices:
                    device_names.checked(0)  # raises
                facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
                found: dict[int, Dispatcher] = {}
                try:
                    for part in self.spec.parts():
                        facts["devices"] = {device.uuid: device.index for device in part.devices}
                        connection = open_session(part, facts)
                        self.welcome = self.welcome or connection.welcome
                        dispatcher = Dispatcher(CommandStream(connection, part.devices), ResizeOutputs())
                        dispatcher.differences = schemas.compare(
                            dispatcher.stream, connection.welcome["torch"]
                        )
                        dispatcher.stream.push((SEED, self.seed & SEED_BITS, -1))
                        found.update((device.index, dispatcher) for device in part.devices)
                except BaseException:
                    for dispatcher in found.values():
                        dispatcher.stream.close()
                    raise
                self._of = found
                self.call = MultiWorkerDispatcher(found) if len(self.streams()) > 1 else dispatcher
            return self.call

    def dispatcher(self, index: int = 0) -> Dispatcher:
        """The dispatcher of the worker that has the slice ``index``."""
        if self.call is None:
            self.connect()
            device_names.checked(index)  # CUDA_VISIBLE_DEVICES may have changed since the caller asked
        return self._of[index]

    def streams(self) -> list[CommandStream]:
        """The stream to each worker that this process is connected to."""
        return list(dict.fromkeys(dispatcher.stream for dispatcher in self._of.values()))

    def memory(self, index: int) -> DeviceMemory:
        """What this process has allocated on the slice ``index``."""
        return self.dispatcher(index).stream.memory[index]

    def resize(self, devices: tuple[DeviceSpec, ...]) -> None:
        """Take over the slices' new limits."""
        limits = {device.uuid: device.limit_mib for device in devices}

        def resized(spec: AttachSpec) -> AttachSpec:
            now = (replace(d, limit_mib=limits.get(d.uuid, d.limit_mib)) for d in spec.devices)
            return replace(spec, devices=tuple(now))

        with self._connecting:
            self.lease, self.spec = resized(self.lease), resized(self.spec)
            if self.connected:
                for device in self.spec.devices:
                    self.memory(device.index).resize(device.limit_mib << 20)

    def close(self) -> None:
        """End the session with every worker."""
        for stream in self.streams():
            stream.close()


def open_session(part: AttachSpec, facts: dict[str, Any]) -> ResumableConnection:
    """Open a session with a worker of the lease. Raises what the handshake raises."""
    known = {**facts, "process": processes.identity()}

    def connect(fields: dict[str, Any], timeout_s: float) -> tuple[Connection, dict[str, Any]]:
        return handshake.connect(part, "session", {**known, **fields}, timeout_s)

    return ResumableConnection(connect, part.host, part.ttl_s)


_session: ClientSession | None = None
_why_not = "no lease is attached to this process; call jupyter_gpupool.attach() or use `gpupool run`"


def current() -> ClientSession | None:
    """The session of the lease that is attached to this process, or None."""
    return _session


def attached() -> ClientSession:
    """The session of the lease that is attached to this process. Raises :class:`NotAttached`."""
    if _session is None:
        raise NotAttached(_why_not)
    return _session


def dispatcher(index: int = 0) -> Dispatcher:
    """The dispatcher of the worker that has the slice ``index``. Raises :class:`NotAttached`."""
    return attached().dispatcher(index)


def stream(index: int) -> CommandStream:
    """The stream to the worker that has the slice ``index``. Raises :class:`NotAttached`."""
    return attached().dispatcher(index).stream


def streams() -> list[CommandStream]:
    """The streams to all workers of the lease. Raises :class:`NotAttached`."""
    session = attached()
    session.connect()
    return session.streams()


def begin(session: ClientSession) -> None:
    """Send this process's operators to ``session`` from now on."""
    global _session
    _session = session


def end(why: str) -> None:
    """Raise :class:`NotAttached` with the message ``why`` at every operator from now on."""
    global _session, _why_not
    _session, _why_not = None, why


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator on its tensors' slices. Raises :class:`NotAttached`."""
    session = attached()
    return (session.call or session.connect())(func, args, kwargs)


def dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``__torch_dispatch__`` of remote tensors."""
    if len(types) > 1 and not all(issubclass(kind, RemoteTensor) for kind in types):
        return NotImplemented  # another subclass, such as a nested tensor, that has remote tensors inside
    session = _session
    if session is None or session.call is None:
        return call(func, args, kwargs or {})
    return session.call(func, args, kwargs)
