"""The lease of this kernel, whether the notebook requested it or the kernel was started with it."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_gpupool.client import lease_holder, pool_finder, requests
from jupyter_gpupool.client.lease_environment import lease_variables, remove_commands
from jupyter_gpupool.core.environment import PENDING, PENDING_LEASE, REFUSED
from jupyter_gpupool.core.errors import PoolError, UnknownLease
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.lease import current
from jupyter_gpupool.pytorch.client.autoload import VARIABLE
from jupyter_gpupool.transport.specs import AttachSpec


def spec() -> AttachSpec | None:
    """Return how this process reaches its lease; None while it has none."""
    own = current()
    if own is not None:
        return own.spec
    return AttachSpec.read(os.environ.get(VARIABLE))


def lease_id() -> str | None:
    """Return the id of the lease that this kernel has or waits for; None if there is none."""
    found = spec()
    return found.lease_id if found is not None else os.environ.get(PENDING_LEASE)


def known(client: Any) -> Lease | None:
    """Return this kernel's lease from the pool, or None if it has none."""
    id = lease_id()
    return client.lease(id) if id else None


def release() -> None:
    """Release this kernel's slices, or leave the queue. Raises PoolError."""
    own = current()
    if own is not None:
        own.release()
        return
    id = lease_id()
    _detach("the lease was released")
    if id is None:
        return
    client, _ = pool_finder.find_pool()
    try:
        client.release(id)
    finally:
        client.close()


def forget_ended() -> bool:
    """Forget this kernel's lease if it has ended; return whether it was forgotten. Raises PoolError.

    A lease that the notebook itself holds is not forgotten: another process holds those that this is about.
    """
    if current() is not None:
        return False
    client, _ = pool_finder.find_pool()
    try:
        lease = known(client)
    except UnknownLease:  # its pool has ended
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
    remove_commands(os.environ)
    session = sys.modules.get("jupyter_gpupool.pytorch.client.session")
    if session is not None:
        session.deactivate(why)


def resize(partial: float | None, memory_mib: int | None) -> AttachSpec:
    """Change the memory of this kernel's slices. Raises PoolError, and then changes nothing."""
    own = current()
    if own is not None:
        own.resize(partial, memory_mib=memory_mib)
        return own.spec
    found = spec()
    assert found is not None, "callers check that there are slices to resize"
    session = sys.modules.get("jupyter_gpupool.pytorch.client.session")
    if session is not None:
        lease_holder.refuse_smaller(found, session.settle(found), partial, memory_mib)
    client, _ = pool_finder.find_pool()
    try:
        found = requests.current_spec(found, client.resize(found.lease_id, partial, memory_mib))
    finally:
        client.close()
    lease_holder.write_config(
        Path(os.environ[VARIABLE]), found
    )  # its holder would write this only with its next heartbeat
    if session is not None:
        session.resize(found)
    return found


_followed: tuple[str, int] = ("", 0)


def follow() -> None:
    """Apply a new size that was set outside this process, which the lease's holder wrote to the lease's file."""
    global _followed
    path = os.environ.get(VARIABLE)
    session = sys.modules.get("jupyter_gpupool.pytorch.client.session")
    if not path or session is None or current() is not None:
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
    """Waits in the background for a lease that was still queued when the kernel started."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._path = Path(os.environ[PENDING])
        self.attached = threading.Event()
        self._over = threading.Event()
        threading.Thread(target=self._wait, name="gpupool-pending", daemon=True).start()

    def stop(self) -> None:
        """Stop waiting."""
        self._over.set()

    def _wait(self) -> None:
        while not self._over.wait(0.25):
            if PENDING not in os.environ:
                return  # the notebook has left the queue
            if self._path.exists():
                break
        else:
            return
        try:
            found = AttachSpec.from_json(self._path.read_text())
            attach(found, str(self._path))
        except (OSError, ValueError, RuntimeError) as e:
            self._tell(f"[gpupool] The GPU slices were granted but cannot be attached: {e}")
            return
        self.attached.set()
        self._tell(f"[gpupool] Attached: {describe(found)}")


_pending: Pending | None = None


def pending() -> Pending | None:
    """Return what waits for this kernel's queued lease, or None if nothing does."""
    return _pending


def start_pending(tell: Callable[[str], None]) -> None:
    """Wait for the lease for which this kernel was started, if it is still queued."""
    global _pending
    if os.environ.get(PENDING) and _pending is None:
        _pending = Pending(tell)


def stop_pending() -> None:
    """Stop waiting. The request itself stays in the queue."""
    global _pending
    if _pending is not None:
        _pending.stop()
        _pending = None


def attach(found: AttachSpec, path: str) -> None:
    """Attach a lease that another process holds, before or after ``import torch``."""
    os.environ.pop(PENDING, None)
    os.environ.pop(PENDING_LEASE, None)
    os.environ.update(lease_variables(found, path, os.environ))
    if "torch" in sys.modules:
        # If the notebook's own thread is importing torch, that import attaches at its end: wait for it.
        importlib.import_module("torch")
        from jupyter_gpupool.pytorch.client import session
        from jupyter_gpupool.pytorch.client.dispatch import attachment

        attached = attachment.current()
        if attached is None or attached.spec.lease_id != found.lease_id:
            session.activate(found)


def label() -> str:
    """Return the label that other users may see of this notebook's lease."""
    name = os.path.basename(os.environ.get("JPY_SESSION_NAME", ""))
    return f"notebook {name}"[:80] if name else "notebook"


def describe(found: AttachSpec) -> str:
    """Return the slices in words: ``2 × Tesla V100-PCIE-32GB (emulated), 26008 MiB each: cuda:0, cuda:1``."""
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
    """Return why the kernel started without the slices requested for it; empty if it did not."""
    return os.environ.get(REFUSED, "")


def pool() -> tuple[Any, dict[str, Any]]:
    """Return a client, which the caller closes, and the pool's state. Raises PoolError."""
    return pool_finder.find_pool(say=lambda line: print(f"[gpupool] {line}"))


__all__ = [
    "Pending",
    "PoolError",
    "attach",
    "describe",
    "follow",
    "known",
    "label",
    "lease_id",
    "pending",
    "pool",
    "refusal",
    "release",
    "spec",
    "start_pending",
    "stop_pending",
]
