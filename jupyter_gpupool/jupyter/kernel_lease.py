"""A kernel's lease: asked for beside the kernel's start, held by the process that manages the kernel."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from .. import holder
from ..api.client import PoolClient
from ..pool.errors import LeaseEnded, NoCapacity, PoolError
from ..pool.models import Lease, LeaseState
from ..remote.specs import AttachSpec
from . import door
from .contract import LEASE, PENDING, PENDING_LEASE, REFUSED
from .hub.single_user import attach
from .wishes import Wish

#: How long a kernel's start waits for a pool that is itself just starting, in seconds: one that would
#: rather start without its GPUs, and one that requires them.
_PATIENCE_S = 10.0
_REQUIRING_PATIENCE_S = 120.0


class KernelLease:
    """One lease for one kernel, through all its restarts. Every call may block: use it from a thread.

    ``tell`` is given lines for the log, from any thread. After :meth:`begin` there is an environment
    for the kernel at any time; :meth:`release` ends whatever has become of it.
    """

    def __init__(self, wish: Wish, label: str, tell: Callable[[str], None]) -> None:
        self.wish = wish
        self._tell = tell
        self._request, self._secret = holder.new_request(**wish.asked(), wait=not wish.require, label=label)
        self._folder = Path(tempfile.mkdtemp(prefix="gpupool-kernel-"))  # readable by this user alone
        self._config = self._folder / "lease.json"
        self._changed = threading.Condition()
        self._state: LeaseState | None = None
        self._refusal: PoolError | None = None
        self._client: PoolClient | None = None
        self._hold: holder.Hold | None = None
        self._spec: AttachSpec | None = None
        self._over = False
        self._hosted_here = False
        self._obtaining = threading.Thread(target=self._obtain, name="gpupool-kernel-lease", daemon=True)
        self._watching: threading.Event | None = None

    @property
    def id(self) -> str:
        return self._request.id

    @property
    def refusal(self) -> PoolError | None:
        """Why there is none and will be none, unless it was held once."""
        return self._refusal

    @property
    def held(self) -> bool:
        hold = self._hold
        return hold is not None and not hold.lost and not self._over

    @property
    def ended(self) -> bool:
        """Whether it came to nothing, was lost, or was given back."""
        return self._over or self._refusal is not None or (self._hold is not None and bool(self._hold.lost))

    def begin(self) -> None:
        """Ask for the lease; returns when it is held, queued or refused, or takes too long for a kernel's start.

        Raises, with nothing left behind, InvalidRequest and ImpossibleRequest (the wish has to be changed) and,
        if the wish requires the GPUs, whatever else kept it from being granted.
        """
        self._obtaining.start()
        with self._changed:
            patience = _REQUIRING_PATIENCE_S if self.wish.require else _PATIENCE_S
            self._changed.wait_for(self._is_settled, patience)
        refusal = self._refusal
        if refusal is None and self.wish.require and not self.held:
            refusal = NoCapacity(f"the pool did not grant them within {_REQUIRING_PATIENCE_S:g} s")
        if refusal is not None and (self.wish.require or refusal.status in (400, 422)):
            self.release()
            raise refusal

    def _is_settled(self) -> bool:
        return bool(self._hold or self._refusal or self._state is LeaseState.QUEUED)

    def environment(self) -> dict[str, str]:
        """What the kernel's environment is to say; see docs/architecture.md."""
        if self.held and self._spec is not None:
            environment = {LEASE: str(self._config)}
            if self._spec.mode == "direct":
                environment["CUDA_VISIBLE_DEVICES"] = holder.visible_devices(self._spec)
            return environment
        if self._refusal is not None:
            return {REFUSED: " ".join(str(self._refusal).split())}
        return {PENDING: str(self._config), PENDING_LEASE: self.id}

    def refresh(self) -> None:
        """Before the kernel starts again: what the lease's file says is to be what the lease has become."""
        hold, client = self._hold, self._client
        if hold is None or client is None or not self.held:
            return
        try:
            lease = client.lease(self.id)
        except (PoolError, RuntimeError):  # RuntimeError: released meanwhile
            return
        with self._changed:
            if self._spec is None or self._over or lease.worker is None:
                return
            spec = holder.attach_spec(client, lease, self._secret, self._spec.mode)
            if spec != self._spec:
                self._write(spec)

    def release(self) -> None:
        """Give it back, or leave the queue. Harmless when it is over."""
        with self._changed:
            if self._over:
                return
            self._over = True
            hold, client = self._hold, self._client
        self.unwatch()
        if hold is not None and hold.lost:
            # Its worker is gone and the pool knows it, or is gone as well: nobody needs to wait for the goodbye.
            threading.Thread(target=hold.release, name="gpupool-goodbye", daemon=True).start()
        elif hold is not None:
            hold.release()
        elif client is not None:
            with contextlib.suppress(PoolError, RuntimeError):
                client.release(self.id)
        if self._obtaining.ident and self._obtaining is not threading.current_thread():
            self._obtaining.join(5.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- beside the kernel's start

    def _obtain(self) -> None:
        hold = None
        try:
            address = door.address
            self._hosted_here = address is not None
            client, _ = holder.find_pool(address.url, address.token) if address else holder.find_pool()
            self._client = client
            lease = holder.acquire(client, self._request, news=self._news)
            spec = holder.attach_spec(client, lease, self._secret, holder.attach_mode(attach(), lease))
            hold = holder.Hold(client, lease, spec, on_lost=self._lost, on_resized=self._resized)
            with self._changed:
                if not self._over:
                    self._write(spec)
                    self._hold = hold
                    self._changed.notify_all()
                    return
        except (PoolError, OSError, RuntimeError) as e:
            # RuntimeError: the client was closed. OSError: the file cannot be written (a full disk, say).
            refusal = e if isinstance(e, PoolError) else PoolError(str(e))
            with self._changed:
                self._refusal = refusal
                self._changed.notify_all()
            if not self._over and not (self.wish.require or refusal.status in (400, 422)):
                self._tell(f"No GPU for the kernel: {refusal}")
        if hold is not None:
            hold.release()
        elif self._client is not None:
            self._client.close()

    def _news(self, lease: Lease) -> None:
        if self._over:
            raise LeaseEnded("the kernel does not want it any more")
        with self._changed:
            self._state = lease.state
            self._changed.notify_all()

    def _write(self, spec: AttachSpec) -> None:
        """Whole at once: the kernel may be waiting for it."""
        draft = self._folder / "draft"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            f.write(spec.to_json())
        os.replace(draft, self._config)
        self._spec = spec

    def _lost(self, reason: str) -> None:
        if self._over or (self._hosted_here and door.address is None):
            return  # no news: it was given back, or this server is shutting down
        self._tell(f"Lease {self.id} of a kernel has ended: {reason}")

    # -- beside the kernel's life

    def _resized(self, spec: AttachSpec) -> None:
        """By somebody else: the kernel and the processes that it starts read of it in their lease's file."""
        with self._changed:
            if self._over:
                return
            try:
                self._write(spec)
            except OSError as e:
                self._tell(
                    f"Lease {self.id} of a kernel was resized, but {self._config} cannot be written: {e}"
                )

    def watch(self, pid: int, grace_s: float) -> None:
        """Give the lease back ``grace_s`` seconds after the process has ended, unless :meth:`unwatch` comes first."""
        self.unwatch()
        try:
            process = os.pidfd_open(pid)
        except (
            AttributeError,
            OSError,
        ):  # no such system call; or it is gone, and whoever waits for it will say so
            return
        over = self._watching = threading.Event()
        threading.Thread(
            target=self._watch, args=(process, grace_s, over), name="gpupool-kernel-watch", daemon=True
        ).start()

    def unwatch(self) -> None:
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
            self._tell(f"A kernel is gone and was not started again; its lease {self.id} is given back")
            self.release()
