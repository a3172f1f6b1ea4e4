"""A kernel's lease: asked for beside the kernel's start, held by the process that manages the kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from .. import holder
from ..pool.errors import PoolError
from ..pool.models import Lease, LeaseState
from ..remote.specs import AttachSpec
from .wishes import Wish

#: What a kernel's environment says of its lease: the file that describes it; where that file will be once
#: the lease is granted, and the id to ask the pool for until then; or why there is none.
LEASE = "GPUPOOL_LEASE"
PENDING = "GPUPOOL_PENDING"
PENDING_LEASE = "GPUPOOL_PENDING_LEASE"
REFUSED = "GPUPOOL_REFUSED"


class KernelLease:
    """One lease for one kernel, through all its restarts. Every call may block: use it from a thread.

    ``tell`` is given lines for the log, from any thread. After :meth:`begin` there is an environment
    for the kernel at any time; :meth:`release` ends whatever has become of it.
    """

    def __init__(self, wish: Wish, label: str, tell: Callable[[str], None]) -> None:
        self.wish = wish
        self._label = label
        self._tell = tell
        self._folder = Path(tempfile.mkdtemp(prefix="gpupool-kernel-"))  # readable by this user alone
        self._config = self._folder / "lease.json"
        self._changed = threading.Condition()
        self._id = ""
        self._state = ""
        self._refusal: PoolError | None = None
        self._hold: holder.Hold | None = None
        self._over = False
        self._waiting: threading.Thread | None = None

    @property
    def id(self) -> str:
        return self._id

    @property
    def refusal(self) -> PoolError | None:
        """Why there will be no lease, or why it has ended."""
        return self._refusal

    @property
    def config(self) -> Path:
        """The file that describes the lease, once it is granted."""
        return self._config

    def begin(self, patience_s: float = 30.0) -> None:
        """Ask for the lease; returns when it is held, queued or refused, at the latest after ``patience_s``."""
        self._waiting = threading.Thread(target=self._obtain, name="gpupool-kernel-lease", daemon=True)
        self._waiting.start()
        with self._changed:
            self._changed.wait_for(self._is_settled, patience_s)

    def _is_settled(self) -> bool:
        return bool(self._hold or self._refusal or self._state == LeaseState.QUEUED.value)

    @property
    def held(self) -> bool:
        return self._hold is not None and not self._hold.lost

    @property
    def ended(self) -> bool:
        """Whether it came to nothing, or was lost."""
        return self._refusal is not None or (self._hold is not None and bool(self._hold.lost))

    def environment(self) -> dict[str, str]:
        """What the kernel's environment is to say."""
        if self._hold is not None and self.held:
            environment = {LEASE: str(self._config)}
            if self._hold.spec.mode == "direct":
                environment["CUDA_VISIBLE_DEVICES"] = holder.visible_devices(self._hold.spec)
            return environment
        if self._refusal is not None:
            return {REFUSED: str(self._refusal)}
        return {PENDING: str(self._config), PENDING_LEASE: self._id}

    def release(self) -> None:
        """Give it back, or leave the queue. Harmless when it is over."""
        with self._changed:
            over, self._over = self._over, True
            hold = self._hold
        if over:
            return
        if hold is not None:
            hold.release()
        elif self._client is not None and self._id:
            with contextlib.suppress(PoolError, RuntimeError):
                self._client.release(self._id)
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- beside the kernel

    _client: holder.PoolClient | None = None

    def _obtain(self) -> None:
        try:
            self._client, pool = holder.find_pool()
            request, secret = holder.new_request(
                **self.wish.asked(), wait=not self.wish.require, label=self._label
            )
            with self._changed:
                if self._over:
                    return
                self._id = request.id
            lease = holder.acquire(self._client, request, news=self._news)
            spec = holder.attach_spec(lease, secret, holder.attach_mode("auto", lease))
            hold = holder.Hold(self._client, lease, spec, on_lost=self._lost)
        except PoolError as e:
            self._client_closed()
            with self._changed:
                self._refusal = e
                self._changed.notify_all()
            if not self._over:
                self._tell(f"No GPU for the kernel: {e}")
            return
        with self._changed:
            if not self._over:
                self._write(spec)
                self._hold = hold
                self._changed.notify_all()
                return
        hold.release()

    def _client_closed(self) -> None:
        if self._client is not None:
            self._client.close()

    def _news(self, lease: Lease) -> None:
        with self._changed:
            self._state = lease.state.value
            self._changed.notify_all()

    def _write(self, spec: AttachSpec) -> None:
        """Whole at once: the kernel may be waiting for it."""
        draft = self._folder / "draft"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as f:
            f.write(spec.to_json())
        os.replace(draft, self._config)

    def _lost(self, reason: str) -> None:
        self._tell(f"The kernel's lease {self._id} has ended: {reason}")
