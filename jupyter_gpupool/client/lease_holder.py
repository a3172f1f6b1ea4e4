"""Holding a lease: heartbeats to the pool, lifelines to the workers, and the file that describes the lease."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.errors import LeaseEnded, PoolError, SliceInUse, UnknownLease
from jupyter_gpupool.core.files import write_atomically
from jupyter_gpupool.core.models import Lease, LeaseState, Request
from jupyter_gpupool.core.validation import check_memory
from jupyter_gpupool.transport.frames import WireError
from jupyter_gpupool.transport.handshake import Refused
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec

from .direct import choose_connection
from .http import PoolClient
from .requests import acquire, attach_spec, current_spec


class LeaseHolder:
    """Holds an ACTIVE lease from this process until :meth:`release`, or until the process ends.

    It takes over ``client`` and closes it on release. ``on_lost`` is called once, from another thread, with one line
    for people, when the lease ends without being released here. ``on_resized`` is called, from another thread too,
    with the new spec when somebody else resizes the lease, or when it has moved. ``on_waiting`` is called, from
    another thread too, with each position in the queue of a lease that was parked and whose program needs its GPUs.
    Raises LeaseEnded when its worker cannot be reached. On any exception, KeyboardInterrupt included, the lease is
    released and ``client`` closed.
    """

    def __init__(
        self,
        client: PoolClient,
        lease: Lease,
        spec: AttachSpec,
        on_lost: Callable[[str], None] | None = None,
        on_resized: Callable[[AttachSpec], None] | None = None,
        on_waiting: Callable[[int], None] | None = None,
    ) -> None:
        self.lease = lease
        self.spec = spec
        self._client = client
        self._on_lost = on_lost
        self._on_resized = on_resized
        self._on_waiting = on_waiting
        self._position: int | None = None
        self._lock = threading.Lock()
        self._resizing = threading.Lock()
        self._resizes = 0
        self._lost = ""
        self._over = threading.Event()
        self._released = False
        self._pid = os.getpid()
        self._lifeline: Lifeline | None = None
        try:
            with _signals_blocked():
                self._lifeline = Lifeline(spec, self._lose, processes.vouched, self._locate)
                self._heartbeats = threading.Thread(
                    target=self._send_heartbeats, name="gpupool-heartbeat", daemon=True
                )
                self._heartbeats.start()
        except (Refused, OSError, WireError) as e:
            self.release()
            raise LeaseEnded(f"the worker of lease {lease.id} cannot be reached: {e}") from None
        except BaseException:
            # A signal that came meanwhile is acted on as soon as it may be, when the lifeline is connected already.
            self.release()
            raise

    @property
    def lost(self) -> str:
        """Why the lease ended without being released here; empty while it has not."""
        return self._lost

    def release(self) -> None:
        """Release the lease and return once its slices are free. Harmless when called again.

        If the pool does not answer, they are free once the workers, which are notified first, have ended.
        In a forked child this does nothing: the lease is the parent's.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._released:
                return
            self._released = True
            self._over.set()
        if self._lifeline is not None:
            self._lifeline.release()
        with contextlib.suppress(PoolError):
            self._client.release(self.lease.id)
        self._client.close()

    def resize(self, partial: float | None = None, memory_mib: int | None = None) -> AttachSpec:
        """Change the memory of every slice; the GPUs stay. Raises PoolError; then nothing has changed."""
        with self._resizing:
            lease = self._client.resize(self.lease.id, partial, memory_mib)
            self._resizes += 1
            self.spec = current_spec(self.spec, lease)
            return self.spec

    def reason(self, patience_s: float = 10.0) -> str:
        """Return why a lost lease ended: the pool's reason within ``patience_s`` seconds, else the lifeline's."""
        deadline = time.monotonic() + patience_s
        try:
            lease = self._client.lease(self.lease.id)
            while not lease.state.ended and time.monotonic() < deadline:
                lease = self._client.wait(lease.id, lease, max(0.0, deadline - time.monotonic()))
        except PoolError:
            return self._lost
        return lease.reason if lease.state.ended and lease.reason else self._lost

    def look(self) -> None:
        """Notice now what the next heartbeat would: that the pool has ended the lease."""
        if not self._over.is_set():
            with contextlib.suppress(PoolError):
                lease = self._client.lease(self.lease.id)
                if lease.state.ended:
                    self._lose(lease.reason or f"lease {lease.id} has ended")

    def state(self) -> LeaseState:
        """Return the lease's state; LOST where it has ended and the pool does not answer."""
        if not self._over.is_set():
            return LeaseState.ACTIVE
        if not self._lost:
            return LeaseState.RELEASED
        try:
            lease = self._client.lease(self.lease.id)
        except (PoolError, RuntimeError):  # RuntimeError: the client was closed by release()
            return LeaseState.LOST
        return lease.state if lease.state.ended else LeaseState.LOST

    def _send_heartbeats(self) -> None:
        while not self._over.wait(self.lease.ttl_s / 4):
            try:
                self._ask(self._client.heartbeat)
            except (LeaseEnded, UnknownLease) as e:
                self._lose(str(e))
            except PoolError:
                pass  # the pool may be restarting; the worker goes on while the lifeline is connected
            except RuntimeError:
                return  # the client is closed: the lease was released

    def _ask(self, call: Callable[[str], Lease]) -> None:
        """Apply what the pool answers to a call. Raises PoolError, and RuntimeError if the client was closed."""
        resizes = self._resizes
        lease = call(self.lease.id)
        position = lease.position if lease.is_woken else None
        if position is not None and position != self._position and self._on_waiting is not None:
            self._on_waiting(position)
        self._position = position
        with self._resizing:
            spec = current_spec(self.spec, lease)
            if spec == self.spec or resizes != self._resizes:  # the answer may be from before a resize
                return
            self.spec = spec
        if self._on_resized is not None:
            self._on_resized(spec)

    def _locate(self) -> AttachSpec | None:
        """Ask the pool where the lease is, which may have moved."""
        try:
            self._ask(self._client.lease)
        except (PoolError, RuntimeError):  # RuntimeError: the client was closed by release()
            return None
        return self.spec

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._lost = reason
            self._over.set()
        if self._on_lost is not None:
            self._on_lost(reason)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block all signals; threads started in this block leave them to the main thread."""
    if not hasattr(signal, "pthread_sigmask"):  # the main thread gets every signal there
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def acquired(
    client: PoolClient,
    request: Request,
    secret: str,
    *,
    connection: str = "auto",
    timeout_s: float | None = None,
    on_update: Callable[[Lease], None] = lambda lease: None,
    on_lost: Callable[[str], None] | None = None,
    on_resized: Callable[[AttachSpec], None] | None = None,
    on_waiting: Callable[[int], None] | None = None,
) -> Iterator[LeaseHolder]:
    """Acquire a lease, hold it, and run the block. If anything raises, release the lease and close ``client``.

    When the block ends without an exception the lease stays held, until :meth:`LeaseHolder.release`.
    The parameters are those of :func:`.requests.acquire`, :func:`.direct.choose_connection` and :class:`LeaseHolder`,
    and so are the errors.
    """
    holder: LeaseHolder | None = None
    try:
        lease = acquire(client, request, on_update=on_update, timeout_s=timeout_s)
        spec = attach_spec(client, lease, secret, choose_connection(connection, lease))
        holder = LeaseHolder(client, lease, spec, on_lost, on_resized, on_waiting)
        yield holder
    except BaseException:
        if holder is not None:
            holder.release()
        else:
            # Nothing of it is left, whatever was interrupted. RuntimeError: the client is closed, for it was released.
            with contextlib.suppress(PoolError, RuntimeError):
                client.release(request.id)
            client.close()
        raise


def refuse_smaller(
    spec: AttachSpec, in_use: list[int], partial: float | None, memory_mib: int | None
) -> None:
    """Raise SliceInUse where a slice has more memory in use than its new size.

    ``in_use``: MiB in use of each slice, in device order. ``partial``: the new size as a fraction of the GPU's memory;
    ``memory_mib``: in MiB instead.
    """
    check_memory(partial, memory_mib)
    for device, used in zip(spec.devices, in_use):
        wanted = memory_mib if memory_mib is not None else int((partial or 0) * device.total_mib)
        if used > wanted:
            raise SliceInUse(
                f"cuda:{device.index} has {used} MiB in use and cannot be made smaller than that; "
                "delete tensors, or move them to the CPU"
            )


def new_config() -> Path:
    """Create an empty temporary file for GPUPOOL_LEASE to name, readable by this user alone. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix="gpupool")
    os.close(handle)
    return Path(name)


def write_config(path: Path, spec: AttachSpec) -> None:
    """Replace the file that GPUPOOL_LEASE names. Raises OSError."""
    write_atomically(path, spec.to_json())
