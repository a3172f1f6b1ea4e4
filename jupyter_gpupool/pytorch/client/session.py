"""Attaches a lease to this process, and releases it."""

from __future__ import annotations

import atexit
import os
import re
import warnings

import torch

from jupyter_gpupool.pytorch.protocol.commands import MEMORY
from jupyter_gpupool.pytorch.torch_internals.names import TESTED
from jupyter_gpupool.transport.specs import AttachSpec

from .compile import dynamo, fake_tensors, skip_frames
from .cuda import alias
from .device import registration, sharded_tensors
from .dispatch import attachment
from .dispatch.attachment import ClientSession, NotAttached
from .tensor import device_names
from .tensor.tensor import RemoteTensor

__all__ = ["NotAttached", "ClientSession", "activate", "deactivate", "lose", "resize", "settle"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"

#: The lease that is attached directly, without a session.
_direct: AttachSpec | None = None
#: The releases that this process was warned of.
_warned: set[tuple[int, ...]] = set()


def activate(spec: AttachSpec) -> ClientSession:
    """Make the slices of a lease the ``gpupool`` devices of this process, and its ``cuda`` devices if it has
    none of its own.

    Connects at the first operator. Raises RuntimeError if a lease is attached already, or if this release
    of PyTorch is older than those that are supported. A newer one is used with a warning.
    """
    global _direct
    attached = attachment.current()
    if attached is not None:
        raise RuntimeError(
            f"lease {attached.spec.lease_id} is attached to this process already, and a process can have only one; "
            "release it first"
        )
    if spec.mode == "direct":
        alias.cap_memory(spec)
        _direct = spec
        return ClientSession(spec)
    _check_release()
    registration.register()
    session = ClientSession(spec)
    attachment.begin(session)
    device_names.refresh = _refresh
    device_names.reset_current_index()
    _show(session, own_cuda=torch.cuda.device_count() > 0)
    RemoteTensor.__torch_dispatch__ = classmethod(attachment.dispatch)  # type: ignore[assignment]
    fake_tensors.install()
    dynamo.install()
    sharded_tensors.install()
    skip_frames.skip_package(__package__)
    return session


def _refresh() -> None:
    """Read CUDA_VISIBLE_DEVICES anew if the program has not used a GPU yet, as CUDA does."""
    session = attachment.current()
    if session is None or session.connected or not device_names.cuda_is_ours:
        return
    if os.environ.get(_VISIBLE) != device_names.choice:
        alias.unalias()
        _show(session, own_cuda=False)


def _show(session: ClientSession, own_cuda: bool) -> None:
    """Let the devices be the slices that CUDA_VISIBLE_DEVICES leaves.

    In a process with CUDA devices of its own, the variable is about those.
    """
    text = None if own_cuda else os.environ.get(_VISIBLE)
    session.spec = session.lease.visible(text)
    device_names.count = len(session.spec.devices)
    device_names.left_out = len(session.lease.devices) - device_names.count
    device_names.choice = text
    if device_names.current_index() >= device_names.count:
        device_names.reset_current_index()
    alias.alias(session.spec.devices)


def _check_release() -> None:
    """Raise RuntimeError for a PyTorch that is too old, and warn once of one that is newer than those tested.

    Whether it has the names that this package needs was seen when they were imported.
    """
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    oldest, newest = (tuple(map(int, TESTED[k])) for k in (0, -1))
    if release < oldest:
        raise RuntimeError(
            f"the gpupool device does not support PyTorch {torch.__version__}; install PyTorch "
            f"{'.'.join(TESTED[0])} or later"
        )
    if release > newest and release not in _warned:
        _warned.add(release)
        warnings.warn(
            f"jupyter-gpupool was tested with PyTorch up to {'.'.join(TESTED[-1])}, and this is {torch.__version__}; "
            "if something fails, install a newer jupyter-gpupool, or that PyTorch",
            stacklevel=3,
        )


def deactivate(reason: str = "the lease was released") -> None:
    """End the session. Tensors that are still on its slices can no longer be used."""
    global _direct
    direct, _direct = _direct, None
    if direct is not None:
        alias.close_memory(direct)
    session = attachment.current()
    if session is None:
        return
    attachment.end(f"{reason}; its tensors are gone")
    device_names.count = device_names.left_out = 0
    alias.unalias()
    session.close()


def settle(spec: AttachSpec) -> list[int]:
    """MiB in use on each slice, after everything that this process has freed."""
    if spec.mode == "direct":
        torch.cuda.empty_cache()
        return [-(-torch.cuda.memory_reserved(d.index) >> 20) for d in spec.devices]
    session = attachment.current()
    if session is None or not session.connected:
        return [0 for _ in spec.devices]
    used = {d.uuid: -(-attachment.stream(d.index).ask((MEMORY, d.index)) >> 20) for d in session.spec.devices}
    return [used.get(d.uuid, 0) for d in spec.devices]


def resize(spec: AttachSpec) -> None:
    """Take over the limits in ``spec``, and where the lease is, if that lease is attached to this process."""
    if spec.mode == "direct":
        alias.cap_memory(spec)
        return
    session = attachment.current()
    if session is not None and session.spec.lease_id == spec.lease_id:
        session.take_over(spec)
        alias.resize(session.spec.devices)


def lose(reason: str) -> None:
    """Let the next call raise :class:`WorkerGone` with ``reason``: a worker is known to have ended."""
    session = attachment.current()
    if session is not None:
        for stream in session.streams():
            stream.lose(reason)


def _at_exit() -> None:
    """End the session in words, or the worker would wait a while for this process to come back."""
    session = attachment.current()
    if session is not None and session.connected:
        session.close()


def _after_fork() -> None:
    session = attachment.current()
    if session is None:
        return
    if not session.connected:
        # The parent has not used the GPU, so the child can, as with CUDA. It needs locks of its own.
        fresh = ClientSession(session.lease)
        fresh.spec, fresh.seed = session.spec, session.seed
        attachment.begin(fresh)
    else:
        registration.in_fork = True
        attachment.end(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, "
            "you must use the 'spawn' start method"
        )


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # a system without it has no fork either
    os.register_at_fork(after_in_child=_after_fork)
