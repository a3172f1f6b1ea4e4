"""From the options to a lease that is held and a configuration file: what `run` and `request` share."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from .. import holder
from ..api.client import PoolClient
from ..pool.errors import PoolError
from ..pool.models import Lease, LeaseState
from ..remote.autoload import VARIABLE
from ..remote.specs import AttachSpec
from .base import Command

#: Longer than this, and people are told what is waited for, in seconds.
_SOON_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end before it has anything to hand the signal on to."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


@contextlib.contextmanager
def interruptions() -> Iterator[None]:
    """Within, the signals that end a process raise :class:`Interrupted`, so that everything is undone."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    before = {}
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(sig) is not signal.SIG_IGN:
            before[sig] = signal.signal(sig, interrupt)
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


@dataclass(frozen=True)
class Obtained:
    """A held lease, the file that tells processes of it, and where its pool is (host, port)."""

    hold: holder.Hold
    config: Path
    control: tuple[str, int]
    version: str

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to find the lease."""
        spec = self.hold.spec
        added = {VARIABLE: str(self.config)}
        if spec.mode == "direct":
            added["CUDA_VISIBLE_DEVICES"] = holder.visible_devices(spec)
        return added

    def servers(self) -> list[str]:
        """A line per GPU server: host, data port, lease, control port, version."""
        spec = self.hold.spec
        return [f"{p.host} {p.port} {p.lease_id} {self.control[1]} {self.version}" for p in spec.parts()]


class Obtaining:
    """The dialogue with the pool, in the lines that Bitfusion's users know."""

    def __init__(self, app: Command, label: str, config: Path, on_lost: Callable[[str], None]) -> None:
        self._app = app
        self._config = config
        self._tell = app.tell
        self._label = label
        self._on_lost = on_lost
        self._pool: dict[str, Any] = {}
        self._where = ""
        self._granted = False
        self._since = time.monotonic()

    def obtain(self) -> Obtained:
        """Raises PoolError; then, and when interrupted, nothing is left behind but an empty ``config``."""
        args, tell = self._app.args, self._tell
        client, self._pool = self._app.pool()
        try:
            if args.attach == "direct":
                holder.refuse_direct(self._pool)
            self._where = _host_and_port(client)
            request, secret = holder.new_request(
                num_gpus=args.num_gpus,
                partial=args.partial,
                memory_mib=args.memory,
                filters=args.filters,
                spread=args.spread,
                wait=not args.no_wait,
                label=self._label,
            )
            tell.info(f"Query server {self._where} to claim client id: {request.id}")
            tell.info(f"Query server {self._where} gpu availability")
            tell.info("Query server health status")
            self._warn_of_sickness(client)
            tell.info(f"Choosing GPUs from server list [{self._where}]")
            self._since = time.monotonic()
            lease = holder.acquire(client, request, news=self._news)
            hold = self._hold(client, lease, secret)
        except BaseException:
            client.close()
            raise
        try:
            self._config.write_text(hold.spec.to_json())
        except OSError as e:
            hold.release()
            raise PoolError(f"the configuration file cannot be written: {e.strerror}") from None
        except BaseException:
            hold.release()
            raise
        self._say_what_was_locked(lease)
        host, port = _split(client)
        return Obtained(hold, self._config, (host, port), self._pool["version"])

    def _hold(self, client: PoolClient, lease: Lease, secret: str) -> holder.Hold:
        try:
            mode = holder.attach_mode(self._app.args.attach, lease)
            spec = holder.attach_spec(client, lease, secret, mode)
        except PoolError:
            client.release(lease.id)
            raise
        return holder.Hold(client, lease, spec, self._on_lost, self._resized)

    def _resized(self, spec: AttachSpec) -> None:
        """By somebody else: programs that are started from now on read of it in the file."""
        with contextlib.suppress(OSError):
            if self._config.exists():  # else it is being given back
                holder.write_config(self._config, spec)

    def _warn_of_sickness(self, client: PoolClient) -> None:
        for check in client.health()["checks"]:
            if check["status"] == "failing":
                self._tell.warning(f"The pool is not well: {check['name']}: {check['detail']}")

    def _news(self, lease: Lease) -> None:
        if lease.state is LeaseState.QUEUED:
            what = f"Waiting for GPUs: position {lease.position} in the queue"
            self._tell.progress(what, self._since)
        elif lease.state.holds and not self._granted:
            self._granted = True
            self._since = time.monotonic()
            self._say_what_is_requested(lease)
        elif lease.state is LeaseState.GRANTED and time.monotonic() - self._since > _SOON_S / 2:
            self._tell.progress("Waiting for the GPU server to start the worker", self._since)

    def _say_what_is_requested(self, lease: Lease) -> None:
        names = [server["name"] for server in self._pool["servers"]]
        for server in dict.fromkeys(piece.server for piece in lease.slices):
            pieces = [piece for piece in lease.slices if piece.server == server]
            indices = " ".join(str(piece.index) for piece in pieces)
            memory = "/".join(dict.fromkeys(str(piece.memory_mib) for piece in pieces))
            number = names.index(server) if server in names else 0
            self._tell.info(
                f"Requesting GPUs [{indices}] with {memory} MiB of memory from server {number}, "
                f"with version {self._pool['version']}..."
            )

    def _say_what_was_locked(self, lease: Lease) -> None:
        tell, count = self._tell, len(lease.slices)
        tell.plain("Requested resources:")
        tell.plain(f"Server List: {self._where}")
        tell.plain("Client idle timeout: 0 min")
        if lease.request.partial is not None:
            share = f"partial memory {lease.request.partial:g}"
        else:
            share = f"{lease.request.memory_mib} MiB of memory"
        tell.info(f"Locked {count} GPUs with {share}, configuration saved to '{self._config}'")
        emulated = sum(piece.emulated for piece in lease.slices)
        if emulated:
            tell.info(
                f"{emulated} of these GPUs are emulated: their memory is limited, their work is done by the CPU"
            )


def new_config() -> Path:
    """An empty configuration file. Raises PoolError."""
    try:
        return holder.new_config()
    except OSError as e:
        raise PoolError(f"the configuration file cannot be made: {e.strerror}") from None


def release(app: Command, obtained: Obtained) -> None:
    """Give the lease back and remove its file."""
    lost = bool(obtained.hold.lost)
    if not lost:
        app.tell.info(f"Releasing GPUs from config file '{obtained.config}'...")
    obtained.hold.release()
    obtained.config.unlink(missing_ok=True)
    if lost:
        app.tell.info(f"Removed generated config file '{obtained.config}'; the GPUs are released already")
    else:
        count = len(obtained.hold.spec.parts())
        app.tell.info(f"Released GPUs on {count} servers and removed generated config file '{obtained.config}'")


def _host_and_port(client: PoolClient) -> str:
    host, port = _split(client)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(client: PoolClient) -> tuple[str, int]:
    parts = urlsplit(client.url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
