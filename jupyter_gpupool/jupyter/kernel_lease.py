"""A kernel's lease: requested during the kernel's start, held by the process that manages the kernel."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from jupyter_gpupool.client import file_cleaner, lease_holder, pool_finder, requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.client.lease_environment import lease_variables
from jupyter_gpupool.core.environment import PENDING, PENDING_LEASE, REFUSED
from jupyter_gpupool.core.errors import LeaseEnded, NoCapacity, PoolError
from jupyter_gpupool.core.files import write_atomically
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.hub.single_user import attach
from jupyter_gpupool.transport.specs import AttachSpec

from . import process_state
from .kernel_gpu_requests import GPURequest

#: How long a kernel's start waits for the pool's answer, in seconds: if it can start without its GPUs, and if not.
_OPTIONAL_WAIT_S = 10.0
_REQUIRED_WAIT_S = 120.0


class KernelLease:
    """One lease for one kernel, through all its restarts. Every call may block, so call it from a thread.

    ``tell`` is called with lines for the log, from any thread. After :meth:`begin`, :meth:`environment` returns the
    kernel's variables at any time. :meth:`release` ends the lease or the request.
    """

    def __init__(self, gpu_request: GPURequest, label: str, tell: Callable[[str], None]) -> None:
        self.gpu_request = gpu_request
        self._tell = tell
        self._request, self._secret = requests.new_request(
            **gpu_request.arguments(), wait=not gpu_request.require, label=label
        )
        self._folder = Path(tempfile.mkdtemp(prefix="gpupool-kernel-"))  # readable by this user alone
        file_cleaner.remove_at_end(self._folder)
        self._config = self._folder / "lease.json"
        self._changed = threading.Condition()
        self._state: LeaseState | None = None
        self._refusal: PoolError | None = None
        self._client: PoolClient | None = None
        self._hold: lease_holder.LeaseHolder | None = None
        self._spec: AttachSpec | None = None
        self._over = False
        self._hosted_here = False
        self._acquiring = threading.Thread(target=self._acquire, name="gpupool-kernel-lease", daemon=True)
        self._watching: threading.Event | None = None

    @property
    def id(self) -> str:
        """The lease's id."""
        return self._request.id

    @property
    def refusal(self) -> PoolError | None:
        """Why the request failed; None if it has not."""
        return self._refusal

    @property
    def held(self) -> bool:
        """Whether the lease is held now."""
        hold = self._hold
        return hold is not None and not hold.lost and not self._over

    @property
    def ended(self) -> bool:
        """Whether the request failed, or the lease was lost or released."""
        return self._over or self._refusal is not None or (self._hold is not None and bool(self._hold.lost))

    def begin(self) -> None:
        """Request the lease. Returns when it is held, queued or refused, or takes too long for a kernel's start.

        Raises InvalidRequest and ImpossibleRequest, because the user must change the request, and any other PoolError
        if the kernel requires its GPUs. After an error nothing is left behind.
        """
        self._acquiring.start()
        with self._changed:
            patience = _REQUIRED_WAIT_S if self.gpu_request.require else _OPTIONAL_WAIT_S
            self._changed.wait_for(self._is_settled, patience)
        refusal = self._refusal
        if refusal is None and self.gpu_request.require and not self.held:
            refusal = NoCapacity(
                f"the pool did not grant them within {_REQUIRED_WAIT_S:g} s; try again later"
            )
        if refusal is not None and (self.gpu_request.require or refusal.status in (400, 422)):
            self.release()
            raise refusal

    def _is_settled(self) -> bool:
        return bool(self._hold or self._refusal or self._state is LeaseState.QUEUED)

    def environment(self, kernels: Mapping[str, str]) -> dict[str, str]:
        """Return what to add to the kernel's environment, ``kernels``; see docs/reference/environment.md."""
        if self.held and self._spec is not None:
            return lease_variables(self._spec, self._config, kernels)
        if self._refusal is not None:
            return {REFUSED: " ".join(str(self._refusal).split())}
        return {PENDING: str(self._config), PENDING_LEASE: self.id}

    def refresh(self) -> None:
        """Bring the lease's file up to date, before the kernel restarts."""
        hold, client = self._hold, self._client
        if hold is None or client is None or not self.held:
            return
        try:
            lease = client.lease(self.id)
        except (PoolError, RuntimeError):  # RuntimeError: it was released meanwhile
            return
        with self._changed:
            if self._spec is None or self._over or lease.worker is None:
                return
            spec = requests.attach_spec(client, lease, self._secret, self._spec.mode)
            if spec != self._spec:
                self._write(spec)

    def release(self) -> None:
        """Release the lease, or leave the queue. Has no effect if it has ended."""
        with self._changed:
            if self._over:
                return
            self._over = True
            hold, client = self._hold, self._client
        self.unwatch()
        if hold is not None and hold.lost:
            # Its worker has ended, and perhaps the pool: do not wait for their answers.
            threading.Thread(target=hold.release, name="gpupool-release", daemon=True).start()
        elif hold is not None:
            hold.release()
        elif client is not None:
            with contextlib.suppress(PoolError, RuntimeError):
                client.release(self.id)
        if self._acquiring.ident and self._acquiring is not threading.current_thread():
            self._acquiring.join(5.0)
        shutil.rmtree(self._folder, ignore_errors=True)
        file_cleaner.forget(self._folder)

    # -- beside the kernel's start

    def _acquire(self) -> None:
        try:
            address = process_state.address
            self._hosted_here = address is not None
            client, _ = (
                pool_finder.find_pool(address.url, address.token) if address else pool_finder.find_pool()
            )
            self._client = client
            with (
                lease_holder.acquired(
                    client,
                    self._request,
                    self._secret,
                    connection=attach(),
                    on_update=self._on_update,
                    on_lost=self._lost,
                    on_resized=self._resized,
                ) as holder,
                self._changed,
            ):
                over = self._over
                if not over:
                    self._write(holder.spec)
                    self._hold = holder
                    self._changed.notify_all()
            if over:
                holder.release()
        except (PoolError, OSError, RuntimeError) as e:
            # RuntimeError: the client was closed. OSError: the file cannot be written (a full disk, say).
            refusal = e if isinstance(e, PoolError) else PoolError(str(e))
            with self._changed:
                self._refusal = refusal
                self._changed.notify_all()
            if not self._over and not (self.gpu_request.require or refusal.status in (400, 422)):
                self._tell(f"The kernel starts without GPUs: {refusal}")

    def _on_update(self, lease: Lease) -> None:
        if self._over:
            raise LeaseEnded("the kernel was shut down while its request waited")
        with self._changed:
            self._state = lease.state
            self._changed.notify_all()

    def _write(self, spec: AttachSpec) -> None:
        """Write the lease's file atomically, because the kernel may be waiting for it."""
        write_atomically(self._config, spec.to_json())
        self._spec = spec

    def _lost(self, reason: str) -> None:
        if self._over or (self._hosted_here and process_state.address is None):
            return  # it was released, or this server is shutting down
        self._tell(f"Lease {self.id} of a kernel has ended: {reason}")

    # -- beside the kernel's life

    def _resized(self, spec: AttachSpec) -> None:
        """Write the new size to the lease's file, where the kernel and its child processes read it."""
        with self._changed:
            if self._over:
                return
            try:
                self._write(spec)
            except OSError as e:
                self._tell(
                    f"Lease {self.id} of a kernel was resized, but the kernel does not see it: cannot write "
                    f"{self._config} ({e})"
                )

    def watch(self, pid: int, grace_s: float) -> None:
        """Release the lease ``grace_s`` seconds after the process has ended, unless :meth:`unwatch` is called first."""
        self.unwatch()
        try:
            process = os.pidfd_open(pid)
        except (AttributeError, OSError):
            return  # there is no such system call, or the process has ended and its manager will notice
        over = self._watching = threading.Event()
        threading.Thread(
            target=self._watch, args=(process, grace_s, over), name="gpupool-kernel-watch", daemon=True
        ).start()

    def unwatch(self) -> None:
        """Stop watching the kernel's process."""
        if self._watching is not None:
            self._watching.set()
            self._watching = None

    def _watch(self, process: int, grace_s: float, over: threading.Event) -> None:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        try:
            while not poll.poll(500):
                if over.is_set():
                    return
        finally:
            os.close(process)
        if not over.wait(grace_s):
            self._tell(f"A kernel has ended and was not restarted; releasing its lease {self.id}")
            self.release()
