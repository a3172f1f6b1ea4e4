"""This process's attachment to its lease: none, one, or (in a fork) one that is the parent's."""

from __future__ import annotations

import os

import torch

from . import compiling, connection, cuda, device, handshake, names
from .connection import NotAttached, Session
from .records import MEMORY
from .specs import AttachSpec
from .tensor import RemoteTensor

__all__ = ["NotAttached", "Session", "activate", "deactivate", "lose", "resize", "settle"]

#: PyTorch releases whose internals this device is known to fit.
SUPPORTED = (("2", "11"), ("2", "12"), ("2", "13"))


#: The lease that is attached directly: there is no session then.
_direct: AttachSpec | None = None


def activate(spec: AttachSpec) -> Session:
    """Make the lease's slices this process's ``gpupool`` devices, and its ``cuda`` devices where it
    has none of its own. Raises RuntimeError for a PyTorch that is not supported, or when a lease is attached."""
    global _direct
    attached = connection.current()
    if attached is not None:
        raise RuntimeError(
            f"lease {attached.spec.lease_id} is attached to this process already; release it first"
        )
    if spec.mode == "direct":
        cuda.cap_memory(spec)
        _direct = spec
        return Session(spec)
    if handshake.release(torch.__version__) not in SUPPORTED:
        known = ", ".join(".".join(r) for r in SUPPORTED)
        raise RuntimeError(
            f"PyTorch {torch.__version__} is not supported by the gpupool device; install one of {known}"
        )
    device.register()
    session = Session(spec)
    connection.begin(session)
    names.count = len(spec.devices)
    names.set_current_index(0)
    cuda.alias(spec.devices)
    RemoteTensor.__torch_dispatch__ = classmethod(connection.dispatch)  # type: ignore[assignment]
    compiling.leave_alone(__package__)
    return session


def deactivate(reason: str = "the lease was released") -> None:
    """End the session; tensors left on the device can no longer be used."""
    global _direct
    direct, _direct = _direct, None
    if direct is not None:
        cuda.close_memory(direct)
    session = connection.current()
    if session is None:
        return
    connection.end(f"{reason}; its tensors are gone")
    names.count = 0
    cuda.unalias()
    session.close()


def settle(spec: AttachSpec) -> list[int]:
    """MiB in use on each slice, once everything that this process has freed is free there too."""
    if spec.mode == "direct":
        torch.cuda.empty_cache()
        return [-(-torch.cuda.memory_reserved(d.index) >> 20) for d in spec.devices]
    session = connection.current()
    if session is None or not session.connected:
        return [0 for _ in spec.devices]
    return [-(-connection.stream(d.index).ask((MEMORY, d.index)) >> 20) for d in spec.devices]


def resize(spec: AttachSpec) -> None:
    """The lease that is attached to this process has the limits of ``spec`` from here on."""
    if spec.mode == "direct":
        cuda.cap_memory(spec)
        return
    session = connection.current()
    if session is not None and session.spec.lease_id == spec.lease_id:
        session.resize(spec.devices)
        cuda.resize(spec.devices)


def lose(reason: str) -> None:
    """A worker is known to be gone: let the next call say so instead of waiting for it."""
    session = connection.current()
    if session is not None:
        for stream in session.streams():
            stream.lose(reason)


def _after_fork() -> None:
    if connection.current() is not None:
        device.in_fork = True
        connection.end(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, "
            "you must use the 'spawn' start method"
        )


os.register_at_fork(after_in_child=_after_fork)
