"""This process's attachment to its lease: none, one, or (in a fork) one that is the parent's."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from . import cuda, device, handshake, names
from .dispatch import Dispatcher
from .records import SEED, SEED_BITS
from .specs import AttachSpec
from .stream import Stream
from .tensor import RemoteTensor

#: PyTorch releases whose internals this device is known to fit.
SUPPORTED = (("2", "11"), ("2", "12"), ("2", "13"))


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


def activate(spec: AttachSpec) -> Session:
    """Make the lease's slices this process's ``gpupool`` devices, and its ``cuda`` devices where it
    has none of its own. Raises RuntimeError for a PyTorch that is not supported, or when a lease is attached."""
    global _session
    if _session is not None:
        raise RuntimeError(
            f"lease {_session.spec.lease_id} is attached to this process already; release it first"
        )
    if spec.mode == "direct":
        cuda.cap_memory(spec)
        return Session(spec)
    if handshake.release(torch.__version__) not in SUPPORTED:
        known = ", ".join(".".join(r) for r in SUPPORTED)
        raise RuntimeError(
            f"PyTorch {torch.__version__} is not supported by the gpupool device; install one of {known}"
        )
    device.register()
    _session = Session(spec)
    names.count = len(spec.devices)
    names.set_current_index(0)
    cuda.alias(spec.devices)
    RemoteTensor.__torch_dispatch__ = classmethod(_dispatch)  # type: ignore[assignment]
    return _session


def deactivate(reason: str = "the lease was released") -> None:
    """End the session; tensors left on the device can no longer be used."""
    global _session, _why_not
    if _session is None:
        return
    session, _session = _session, None
    _why_not = f"{reason}; its tensors are gone"
    names.count = 0
    cuda.unalias()
    session.close()


def lose(reason: str) -> None:
    """The worker is known to be gone: let the next call say so instead of waiting for it."""
    if _session is not None and _session.connected:
        _session.dispatcher().stream.lose(reason)


def _dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    session = _session
    if session is None or session._dispatcher is None:
        return dispatcher()(func, args, kwargs or {})
    return session._dispatcher(func, args, kwargs)


def _after_fork() -> None:
    global _session, _why_not
    if _session is not None:
        device.in_fork = True
        _why_not = (
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, "
            "you must use the 'spawn' start method"
        )
        _session = None


os.register_at_fork(after_in_child=_after_fork)
