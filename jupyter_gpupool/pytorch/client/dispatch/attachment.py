"""The lease that is attached to this process, and its connections to the workers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.environment import LEASE
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream, WorkerGone
from jupyter_gpupool.pytorch.client.tensor.device_memory import DeviceMemory
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.protocol.commands import SEED, SEED_BITS
from jupyter_gpupool.transport import frames, handshake
from jupyter_gpupool.transport.resumable_connection import ResumableConnection
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec
from jupyter_gpupool.transport.tls import Connection

from . import ranks, schemas
from .dispatcher import Dispatcher
from .multi_worker import MultiWorkerDispatcher
from .resizing import ResizeOutputs

#: How long a worker is waited for that takes the place of another one, and the pause between attempts, in seconds.
REPLACED_WITHIN_S = 10.0
_PAUSE_S = 0.05


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
        #: how many sessions have taken the place of one that had broken
        self.renewals = 0
        #: the welcome of the first worker, see handshake.py
        self.welcome: dict[str, Any] = {}

    @property
    def connected(self) -> bool:
        """Whether the connections have been made."""
        return len(self._of) > 0  # a compiler reads this, and that of PyTorch 2.11 knows no bool of a dict

    def connect(self) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        """Connect to every worker unless that is done, and return ``call``.

        A session that has broken is replaced by a new one, once the program has got the exception that says so.
        Raises what the handshake raises, and WorkerGone.
        """
        with self._connecting:
            broken = [stream for stream in self.streams() if stream.broken_at is not None]
            for stream in broken:
                stream.raise_reported()
            call = self._established()
            for stream in broken:
                if not stream.is_told:
                    raise stream.gone(is_renewed=True)
            return call

    def _established(self) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        """``call``, after connecting where that is needed. Called with the lock."""
        while (call := self.call) is None:
            if not self._of:
                device_names.refresh()
            if not self.spec.devices:
                device_names.checked(0)  # raises
            found: dict[int, Dispatcher] = {}
            opened: list[CommandStream] = []
            try:
                for part in self._parts():
                    former = self._of.get(part.devices[0].index)
                    dispatcher = former
                    if former is None or former.stream.broken_at is not None:
                        dispatcher = self._open(part, former.stream if former is not None else None)
                        opened.append(dispatcher.stream)
                    assert dispatcher is not None
                    found.update((device.index, dispatcher) for device in part.devices)
            except BaseException:
                for stream in opened:
                    stream.close()
                raise
            for stream in self.streams():
                if stream.broken_at is not None:
                    stream.abandon()
                    self.renewals += 1
            self._of = found
            for stream in opened:
                stream.on_broken = self._note_broken
                stream.renew = self._renew
            self.call = MultiWorkerDispatcher(found) if len(self.streams()) > 1 else found[next(iter(found))]
            if any(stream.broken_at is not None for stream in opened):  # meanwhile
                self.call = None
        return call

    def _parts(self) -> list[AttachSpec]:
        """One spec for each worker, with its devices."""
        if not self._of:
            return list(self.spec.parts())
        # Where workers move, one may be where another one was, as far as is known.
        served: dict[CommandStream, list[DeviceSpec]] = {}
        for device in self.spec.devices:
            served.setdefault(self._of[device.index].stream, []).append(device)
        parts = ((self.spec.part_of(devices[0].index), devices) for devices in served.values())
        return [replace(part, devices=tuple(devices)) for part, devices in parts if part is not None]

    def _open(self, part: AttachSpec, former: CommandStream | None) -> Dispatcher:
        """A new session with a worker, in place of one that has broken, if there was one."""
        facts: dict[str, Any] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "devices": {device.uuid: device.index for device in part.devices},
        }
        connection = self.open(part, facts) if former is None else self._open_again(part, facts, former)
        self.welcome = self.welcome or connection.welcome
        dispatcher = Dispatcher(CommandStream(connection, part.devices), ResizeOutputs())
        try:
            dispatcher.differences = schemas.compare(dispatcher.stream, connection.welcome["torch"])
            dispatcher.stream.push((SEED, self.seed & SEED_BITS, -1))
        except BaseException:
            dispatcher.stream.close()
            raise
        return dispatcher

    def _note_broken(self) -> None:
        self.call = None  # so that the next operator connects

    def _renew(self) -> bool:
        """Replace the sessions that have broken. Return whether that was possible."""
        try:
            with self._connecting:
                self._established()
        except (WorkerGone, handshake.Refused, OSError, frames.WireError):
            return False
        return True

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

    def take_over(self, lease: AttachSpec) -> None:
        """Take over what has changed: the slices' limits, and where the lease is if it has moved."""
        if len(lease.devices) != len(self.lease.devices):
            return  # it tells of another time
        now = {before.uuid: device for before, device in zip(self.lease.devices, lease.devices)}
        address = dict(zip(now, lease.addresses))
        shown = self.spec.devices
        self.spec = replace(
            self.spec,
            host=lease.host,
            port=lease.port,
            devices=tuple(replace(now[d.uuid], index=d.index) if d.uuid in now else d for d in shown),
            addresses=tuple(address[d.uuid] for d in shown if d.uuid in address),
        )
        self.lease = lease
        if self.connected:
            for device in self.spec.devices:
                self._of[device.index].stream.memory[device.index].resize(device.limit_mib << 20)

    def open(self, part: AttachSpec, facts: dict[str, Any]) -> ResumableConnection:
        """Open a session with a worker of the lease. Raises what the handshake raises."""
        known = {**facts, "process": processes.identity()}
        index, numbers = part.devices[0].index, {device.index for device in part.devices}

        def connect(fields: dict[str, Any], timeout_s: float) -> tuple[Connection, dict[str, Any]]:
            while True:
                here = self.spec.part_of(index) or part
                try:
                    return handshake.connect(here, "session", {**known, **fields}, timeout_s)
                except handshake.MovedAway as e:
                    moved(e)
                except (frames.NoWorker, frames.Unreachable):
                    if not self._read_file() or self.spec.part_of(index) == here:
                        raise

        def moved(where: handshake.MovedAway) -> None:
            uuids = {device.uuid for device in self.spec.devices if device.index in numbers}
            self.lease, self.spec = (
                _moved(spec, uuids, (where.host, where.port)) for spec in (self.lease, self.spec)
            )

        return ResumableConnection(connect, part.host, part.ttl_s, on_moved=moved)

    def _open_again(
        self, part: AttachSpec, facts: dict[str, Any], former: CommandStream
    ) -> ResumableConnection:
        """Open a session with a worker that may be about to start. Raises WorkerGone if there is none."""
        assert former.broken_at is not None
        # Where nobody has said that there will be another worker, there is one now or not.
        patience_s = REPLACED_WITHIN_S if former.is_replaced else 0.0
        while not former.is_over:
            try:
                return self.open(part, facts)
            except (ConnectionError, frames.WireError, TimeoutError):
                if time.monotonic() - former.broken_at >= patience_s:
                    break
            except handshake.Refused:
                break
            time.sleep(_PAUSE_S)
        raise former.gone(is_renewed=False)

    def _read_file(self) -> bool:
        """Read the lease's file, where the holder notes where the lease is. Whether it tells of this lease."""
        found = AttachSpec.read(os.environ.get(LEASE))
        if found is None or found.lease_id != self.lease.lease_id:
            return False
        self.take_over(found)
        return True

    def close(self) -> None:
        """End the session with every worker."""
        for stream in self.streams():
            stream.close()


def _moved(spec: AttachSpec, uuids: Collection[str], now: tuple[str, int]) -> AttachSpec:
    """The spec with the worker of these devices at another address."""
    if not spec.addresses:
        return replace(spec, host=now[0], port=now[1])
    addresses = tuple(
        now if device.uuid in uuids else address for device, address in zip(spec.devices, spec.addresses)
    )
    host, port = addresses[0]
    return replace(spec, host=host, port=port, addresses=addresses)


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


def _place(index: int) -> str:
    """What tells the worker that has the slice ``index`` from all others."""
    parts = attached().spec.parts()
    part = next(part for part in parts if any(device.index == index for device in part.devices))
    return f"{part.lease_id} {part.host} {part.port}"


def _peer(index: int) -> str:
    """The name by which other workers of the lease know the one that has the slice ``index``."""
    return str(stream(index).connection.welcome.get("peer") or "")


ranks.tell_workers_apart_by(_place, _peer)


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
