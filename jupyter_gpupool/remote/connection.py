"""This process's connections to the workers of its lease: made when the first operator needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import handshake
from .crossing import Crossing
from .dispatch import Dispatcher
from .records import SEED, SEED_BITS
from .specs import AttachSpec, DeviceSpec
from .stream import DeviceMemory, Stream


class NotAttached(RuntimeError):
    """No lease is attached to this process (any more)."""


class Session:
    """Connects to the workers, of which a lease has one on each server, when the first operator needs them."""

    def __init__(self, spec: AttachSpec) -> None:
        self.spec = spec
        #: what operators are called by: the one worker's dispatcher, or what chooses among several
        self.call: Callable[[Any, tuple, dict], Any] | None = None
        self._of: dict[int, Dispatcher] = {}  # by device
        self._connecting = threading.RLock()
        self.seed = torch.initial_seed()

    @property
    def connected(self) -> bool:
        return self.call is not None

    def connect(self) -> Callable[[Any, tuple, dict], Any]:
        with self._connecting:
            if self.call is None:
                facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
                found: dict[int, Dispatcher] = {}
                try:
                    for part in self.spec.parts():
                        sock, _ = handshake.connect(part, "session", facts)
                        dispatcher = Dispatcher(Stream(sock, part.devices))
                        dispatcher.stream.push((SEED, self.seed & SEED_BITS, -1))
                        found.update((device.index, dispatcher) for device in part.devices)
                except BaseException:
                    for dispatcher in found.values():
                        dispatcher.stream.close()
                    raise
                self._of = found
                self.call = Crossing(found) if len(self.streams()) > 1 else dispatcher
            return self.call

    def dispatcher(self, index: int = 0) -> Dispatcher:
        """The way to the worker that serves that device."""
        if self.call is None:
            self.connect()
        return self._of[index]

    def streams(self) -> list[Stream]:
        """One for each worker that this process is connected to."""
        return list(dict.fromkeys(dispatcher.stream for dispatcher in self._of.values()))

    def memory(self, index: int) -> DeviceMemory:
        return self.dispatcher(index).stream.memory[index]

    def resize(self, devices: tuple[DeviceSpec, ...]) -> None:
        """The slices have other limits from here on."""
        with self._connecting:
            self.spec = replace(self.spec, devices=devices)
            if self.connected:
                for device in devices:
                    self.memory(device.index).resize(device.limit_mib << 20)

    def close(self) -> None:
        for stream in self.streams():
            stream.close()


_session: Session | None = None
_why_not = "no lease is attached to this process; call jupyter_gpupool.attach() or use `gpupool run`"


def current() -> Session | None:
    return _session


def attached() -> Session:
    """Raises :class:`NotAttached`."""
    if _session is None:
        raise NotAttached(_why_not)
    return _session


def dispatcher(index: int = 0) -> Dispatcher:
    """The way to the worker that serves that device. Raises :class:`NotAttached`."""
    return attached().dispatcher(index)


def stream(index: int) -> Stream:
    """Its connection. Raises :class:`NotAttached`."""
    return attached().dispatcher(index).stream


def streams() -> list[Stream]:
    """Those of all workers. Raises :class:`NotAttached`."""
    session = attached()
    session.connect()
    return session.streams()


def begin(session: Session) -> None:
    """From now on this process's operators go to that session."""
    global _session
    _session = session


def end(why: str) -> None:
    """From now on an operator raises :class:`NotAttached`, which says why."""
    global _session, _why_not
    _session, _why_not = None, why


def call(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call an operator on its tensors' slices. Raises :class:`NotAttached`."""
    session = attached()
    return (session.call or session.connect())(func, args, kwargs)


def dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``__torch_dispatch__`` of remote tensors."""
    session = _session
    if session is None or session.call is None:
        return call(func, args, kwargs or {})
    return session.call(func, args, kwargs)
