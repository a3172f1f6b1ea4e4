"""The lease of this kernel, whoever asked for it: the notebook, or who started the kernel."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import face, holder
from ..pool.errors import PoolError, UnknownLease
from ..pool.models import Lease
from ..remote.autoload import VARIABLE
from ..remote.specs import AttachSpec

#: See jupyter/kernel_lease.py, which sets them.
PENDING = "GPUPOOL_PENDING"
PENDING_LEASE = "GPUPOOL_PENDING_LEASE"
REFUSED = "GPUPOOL_REFUSED"


def spec() -> AttachSpec | None:
    """How this process reaches its lease; None while it has none."""
    own = face.current()
    if own is not None:
        return own.spec
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        return AttachSpec.from_json(Path(path).read_text())
    except (OSError, ValueError, TypeError, KeyError):
        return None


def lease_id() -> str | None:
    """Of the lease that this kernel has or waits for."""
    found = spec()
    return found.lease_id if found is not None else os.environ.get(PENDING_LEASE)


def known(client: Any) -> Lease | None:
    """What the pool says of this kernel's lease."""
    id = lease_id()
    return client.lease(id) if id else None


def release() -> None:
    """Give back what this kernel has, or leave the queue. Raises PoolError."""
    own = face.current()
    if own is not None:
        own.release()
        return
    id = lease_id()
    _detach("the lease was released")
    if id is None:
        return
    client, _ = holder.find_pool()
    try:
        client.release(id)
    finally:
        client.close()


def forget_ended() -> bool:
    """Make room for another lease if the one that somebody else holds for this kernel has ended. Raises PoolError."""
    if face.current() is not None:
        return False
    client, _ = holder.find_pool()
    try:
        lease = known(client)
    except UnknownLease:  # of a pool that is gone
        lease = None
    finally:
        client.close()
    if lease is not None and not lease.state.ended:
        return False
    _detach(f"the lease has ended: {lease.reason}" if lease is not None else "the lease has ended")
    return True


def _detach(why: str) -> None:
    for name in (VARIABLE, PENDING, PENDING_LEASE):
        os.environ.pop(name, None)
    session = sys.modules.get("jupyter_gpupool.remote.session")
    if session is not None:
        session.deactivate(why)


def resize(partial: float | None, memory_mib: int | None) -> AttachSpec:
    """Give this kernel's slices another share of their GPUs. Raises PoolError; then nothing has changed."""
    own = face.current()
    if own is not None:
        own.resize(partial, memory_mib=memory_mib)
        return own.spec
    found = spec()
    assert found is not None, "there is something to resize"
    session = sys.modules.get("jupyter_gpupool.remote.session")
    if session is not None:
        holder.refuse_smaller(found, session.settle(found), partial, memory_mib)
    client, _ = holder.find_pool()
    try:
        found = holder.resized_spec(found, client.resize(found.lease_id, partial, memory_mib))
    finally:
        client.close()
    holder.write_config(Path(os.environ[VARIABLE]), found)  # its holder would do so with its next heartbeat
    if session is not None:
        session.resize(found)
    return found


_followed: tuple[str, int] = ("", 0)


def follow() -> None:
    """Take note of another size that somebody outside this process has given its slices: its holder writes it down."""
    global _followed
    path = os.environ.get(VARIABLE)
    session = sys.modules.get("jupyter_gpupool.remote.session")
    if not path or session is None or face.current() is not None:
        return
    try:
        written = (path, os.stat(path).st_mtime_ns)
    except OSError:
        return
    found = spec() if written != _followed else None
    if found is not None:
        _followed = written
        session.resize(found)


class Pending:
    """Waits, beside the notebook, for a lease that was still queued when the kernel started."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._path = Path(os.environ[PENDING])
        self.attached = threading.Event()
        self._over = threading.Event()
        threading.Thread(target=self._wait, name="gpupool-pending", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _wait(self) -> None:
        while not self._over.wait(0.25):
            if PENDING not in os.environ:
                return  # it was given up
            if self._path.exists():
                break
        else:
            return
        try:
            found = AttachSpec.from_json(self._path.read_text())
            attach(found, str(self._path))
        except (OSError, ValueError, RuntimeError) as e:
            self._tell(f"[gpupool] The slices were granted, but cannot be attached: {e}")
            return
        self.attached.set()
        self._tell(f"[gpupool] Attached: {describe(found)}")


def attach(found: AttachSpec, path: str) -> None:
    """Make a lease that somebody else holds this process's own, before or after ``import torch``."""
    os.environ.pop(PENDING, None)
    os.environ.pop(PENDING_LEASE, None)
    os.environ[VARIABLE] = path
    if found.mode == "direct":
        os.environ["CUDA_VISIBLE_DEVICES"] = holder.visible_devices(found)
    if "torch" in sys.modules:
        # An import that is under way in the notebook's own thread attaches by itself at its end: wait for that.
        importlib.import_module("torch")
        from ..remote import connection, session

        attached = connection.current()
        if attached is None or attached.spec.lease_id != found.lease_id:
            session.activate(found)


def label() -> str:
    """What others may read of this notebook's use of the pool."""
    name = os.path.basename(os.environ.get("JPY_SESSION_NAME", ""))
    return f"notebook {name}"[:80] if name else "notebook"


def describe(found: AttachSpec) -> str:
    """``2 × Tesla V100-PCIE-32GB (emulated), 26008 MiB each: cuda:0, cuda:1``"""
    names: dict[tuple[str, int], list[int]] = {}
    for device in found.devices:
        names.setdefault((device.name, device.limit_mib), []).append(device.index)
    parts = []
    for (name, mib), indices in names.items():
        each = " each" if len(indices) > 1 else ""
        devices = ", ".join(f"cuda:{k}" for k in indices)
        parts.append(f"{len(indices)} × {name}, {mib} MiB{each}: {devices}")
    return "; ".join(parts)


def refusal() -> str:
    """Why the kernel was started without the slices it was to have."""
    return os.environ.get(REFUSED, "")


def pool() -> tuple[Any, dict[str, Any]]:
    """A client and what the pool says of itself; close the client. Raises PoolError."""
    return holder.find_pool(say=lambda line: print(f"[gpupool] {line}"))


__all__ = [
    "Pending",
    "PoolError",
    "attach",
    "describe",
    "follow",
    "known",
    "label",
    "lease_id",
    "pool",
    "refusal",
    "release",
    "spec",
]
