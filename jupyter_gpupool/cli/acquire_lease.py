"""Acquire a lease as the options ask, and write its configuration file: what `run` and `request` share."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from jupyter_gpupool.client import lease_holder
from jupyter_gpupool.client.direct import refuse_direct
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.client.lease_environment import lease_variables
from jupyter_gpupool.client.lease_holder import LeaseHolder, acquired, write_config
from jupyter_gpupool.client.requests import new_request
from jupyter_gpupool.core.errors import (
    IssuerUnavailable,
    LedgerUnavailable,
    NotLeading,
    PoolError,
    PoolUnreachable,
)
from jupyter_gpupool.core.models import Lease, LeaseState, Request
from jupyter_gpupool.transport.specs import AttachSpec

from .command import Command

#: What is raised while there is no pool that could grant or refuse anything.
_UNANSWERED = (PoolUnreachable, NotLeading, LedgerUnavailable, IssuerUnavailable)
#: Seconds between two attempts then: the first, and at most.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 15.0

#: After this long, in seconds, people see what the command waits for.
_QUIET_S = 0.5


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end, and no command runs yet to forward it to."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


#: Signals that end a process; Windows has the first two.
_ENDING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, n)]


@contextlib.contextmanager
def interruptions() -> Iterator[None]:
    """Signals that end a process raise :class:`Interrupted` in this block, so that everything is undone."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    before = {}
    for sig in _ENDING:
        if signal.getsignal(sig) is not signal.SIG_IGN:
            before[sig] = signal.signal(sig, interrupt)
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


@dataclass(frozen=True)
class AcquiredLease:
    """A held lease, the file that describes it to processes, and the pool's address (host, port) and version."""

    holder: LeaseHolder
    config: Path
    control: tuple[str, int]
    version: str

    def environment(self) -> dict[str, str]:
        """Return the environment variables by which a process finds the lease."""
        return lease_variables(self.holder.spec, self.config, os.environ)

    def servers(self) -> list[str]:
        """Return a line for each GPU server: host, data port, lease, control port, version."""
        spec = self.holder.spec
        return [f"{p.host} {p.port} {p.lease_id} {self.control[1]} {self.version}" for p in spec.parts()]


class LeaseAcquisition:
    """Acquires a lease, and reports each step in the lines that Bitfusion prints."""

    def __init__(self, app: Command, label: str, config: Path, on_lost: Callable[[str], None]) -> None:
        self._app = app
        self._config = config
        self._log = app.tell
        self._label = label
        self._on_lost = on_lost
        self._pool: dict[str, Any] = {}
        self._where = ""
        self._granted = False
        self._since = time.monotonic()

    def acquire_when_answered(self) -> AcquiredLease:
        """Do as :meth:`acquire`, and try again for as long as no pool answers.

        What the pool refuses is raised, and so is an interruption.
        """
        since, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return self.acquire()
            except _UNANSWERED as e:
                self._log.progress(f"Waiting for the pool: {e}", since)
            # Hundreds of programs wait for the same pool, so they do not come back at the same moment.
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def acquire(self) -> AcquiredLease:
        """Acquire and hold the lease, and write its file.

        Raises PoolError. On any exception, the lease is released and ``config`` stays empty.
        """
        client, self._pool = self._app.pool()
        try:
            request, secret = self._prepare(client)
        except BaseException:
            client.close()
            raise
        with acquired(
            client,
            request,
            secret,
            connection=self._app.args.attach,
            on_update=self._report,
            on_lost=self._on_lost,
            on_resized=self._write_resized,
            on_waiting=self._report_waiting,
        ) as holder:
            try:
                self._config.write_text(holder.spec.to_json())
            except OSError as e:
                raise PoolError(f"cannot write the configuration file {self._config}: {e.strerror}") from None
            self._report_acquired(holder.lease)
        host, port = _split(client)
        return AcquiredLease(holder, self._config, (host, port), self._pool["version"])

    def _prepare(self, client: PoolClient) -> tuple[Request, str]:
        args, log = self._app.args, self._log
        if args.attach == "direct":
            refuse_direct(self._pool)
        self._where = _host_and_port(client)
        request, secret = new_request(
            num_gpus=args.num_gpus,
            partial=args.partial,
            memory_mib=args.memory,
            filters=args.filters,
            spread=args.spread,
            never_park=args.never_park,
            wait=not args.no_wait,
            label=self._label,
        )
        log.info(f"Query server {self._where} to claim client id: {request.id}")
        log.info(f"Query server {self._where} gpu availability")
        log.info("Query server health status")
        self._warn_of_failures(client)
        log.info(f"Choosing GPUs from server list [{self._where}]")
        self._since = time.monotonic()
        return request, secret

    def _write_resized(self, spec: AttachSpec) -> None:
        """Write limits that somebody else has set to the file, for programs that start from now on."""
        with contextlib.suppress(OSError):
            if self._config.exists():  # else the lease is being released
                write_config(self._config, spec)

    def _report_waiting(self, position: int) -> None:
        self._log.info(
            f"Waiting for the GPUs, which others have while the program was idle: position {position} in the queue"
        )

    def _warn_of_failures(self, client: PoolClient) -> None:
        for check in client.health()["checks"]:
            if check["status"] == "failing":
                self._log.warning(f"The pool is failing a health check: {check['name']}: {check['detail']}")

    def _report(self, lease: Lease) -> None:
        if lease.state is LeaseState.QUEUED:
            what = f"Waiting for GPUs: position {lease.position} in the queue"
            self._log.progress(what, self._since)
        elif lease.state.holds and not self._granted:
            self._granted = True
            self._since = time.monotonic()
            self._report_granted(lease)
        elif lease.state is LeaseState.GRANTED and time.monotonic() - self._since > _QUIET_S:
            self._log.progress("Waiting for the GPU server to start the worker", self._since)

    def _report_granted(self, lease: Lease) -> None:
        names = [server["name"] for server in self._pool["servers"]]
        for server in dict.fromkeys(piece.server for piece in lease.slices):
            pieces = [piece for piece in lease.slices if piece.server == server]
            indices = " ".join(str(piece.index) for piece in pieces)
            memory = "/".join(dict.fromkeys(str(piece.memory_mib) for piece in pieces))
            number = names.index(server) if server in names else 0
            self._log.info(
                f"Requesting GPUs [{indices}] with {memory} MiB of memory from server {number}, "
                f"with version {self._pool['version']}..."
            )

    def _report_acquired(self, lease: Lease) -> None:
        log, count = self._log, len(lease.slices)
        log.plain("Requested resources:")
        log.plain(f"Server List: {self._where}")
        log.plain("Client idle timeout: 0 min")
        if lease.request.partial is not None:
            share = f"partial memory {lease.request.partial:g}"
        else:
            share = f"{lease.request.memory_mib} MiB of memory"
        log.info(f"Locked {count} GPUs with {share}, configuration saved to '{self._config}'")
        emulated = sum(piece.emulated for piece in lease.slices)
        if emulated:
            log.info(
                f"{emulated} of these GPUs are emulated: their memory is limited, and the CPU does their work"
            )


def new_config() -> Path:
    """Create an empty configuration file. Raises PoolError."""
    try:
        return lease_holder.new_config()
    except OSError as e:
        raise PoolError(f"cannot create a configuration file: {e.strerror}") from None


def release(app: Command, taken: AcquiredLease) -> None:
    """Release the lease and remove its file."""
    holder, config = taken.holder, taken.config
    lost = bool(holder.lost)
    if not lost:
        app.tell.info(f"Releasing GPUs from config file '{config}'...")
    holder.release()
    config.unlink(missing_ok=True)
    if lost:
        app.tell.info(f"Removed generated config file '{config}'; the GPUs are released already")
    else:
        count = len(holder.spec.parts())
        app.tell.info(f"Released GPUs on {count} servers and removed generated config file '{config}'")


def _host_and_port(client: PoolClient) -> str:
    host, port = _split(client)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(client: PoolClient) -> tuple[str, int]:
    parts = urlsplit(client.url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
