"""This process's connection to its worker: made when the first operator needs it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch

from . import handshake
from .dispatch import Dispatcher
from .records import SEED, SEED_BITS
from .specs import AttachSpec, DeviceSpec
from .stream import Stream


class NotAttached(RuntimeError):
    """No lease is attached to this process (any more)."""


class Session:
    """Connects to the worker when the first operator needs it."""

    def __init__(self, spec: AttachSpec) -> None:
        self.spec = spec
        self._dispatcher: Dispatcher | None = None
        self._welcome: dict[str, Any] = {}
        self._connecting = threading.RLock()
        self.seed = torch.initial_seed()

    @property
    def connected(self) -> bool:
        return self._dispatcher is not None

    def dispatcher(self) -> Dispatcher:
        with self._connecting:
            if self._dispatcher is None:
                facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
                sock, self._welcome = handshake.connect(self.spec, "session", facts)
                dispatcher = Dispatcher(Stream(sock, self.spec.devices))
                dispatcher.stream.push((SEED, self.seed & SEED_BITS, -1))
                self._dispatcher = dispatcher
        return self._dispatcher

    def welcome(self) -> dict[str, Any]:
        """What the worker says of itself and its devices."""
        self.dispatcher()
        return self._welcome

    def resize(self, devices: tuple[DeviceSpec, ...]) -> None:
        """The slices have other limits from here on."""
        with self._connecting:
            self.spec = replace(self.spec, devices=devices)
            if self._dispatcher is not None:
                for memory, device in zip(self._dispatcher.stream.memory, devices):
                    memory.resize(device.limit_mib << 20)

    def close(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.stream.close()


_session: Session | None = None
_why_not = "no lease is attached to this process; call jupyter_gpupool.attach() or use `gpupool run`"


def current() -> Session | None:
    return _session


def dispatcher() -> Dispatcher:
    """The way to the worker. Raises :class:`NotAttached`."""
    if _session is None:
        raise NotAttached(_why_not)
    return _session.dispatcher()


def begin(session: Session) -> None:
    """From now on this process's operators go to that session."""
    global _session
    _session = session


def end(why: str) -> None:
    """From now on an operator raises :class:`NotAttached`, which says why."""
    global _session, _why_not
    _session, _why_not = None, why


def dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``__torch_dispatch__`` of remote tensors."""
    session = _session
    if session is None or session._dispatcher is None:
        return dispatcher()(func, args, kwargs or {})
    return session._dispatcher(func, args, kwargs)
