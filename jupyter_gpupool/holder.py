"""From a request to a lease that this process holds: what ``gpupool run`` and ``attach()`` share.

In order: :func:`find_pool`, :func:`new_request`, :func:`acquire`, :class:`Hold`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .api import bundle, discovery
from .api.client import PoolClient
from .devices.nvml import nvml_gpus
from .pool.errors import (
    InUse,
    InvalidRequest,
    LeaseEnded,
    NoCapacity,
    PoolError,
    PoolUnreachable,
    UnknownLease,
)
from .pool.models import Lease, LeaseState, Request
from .pool.validation import check_memory
from .remote.handshake import Refused
from .remote.lifeline import Lifeline
from .remote.specs import AttachSpec, DeviceSpec
from .remote.wire import WireError

#: How a process uses its slices: through the worker, or (its own machine's GPUs) by itself.
MODES = ("auto", "remote", "direct")

#: Name the pool to ask, and its token, where neither is given.
URL_VARIABLE = "GPUPOOL_URL"
TOKEN_VARIABLE = "GPUPOOL_TOKEN"
#: The certificate of the one authority whose word for that pool is taken: a PEM's lines between its first and its
#: last, as one. Whoever hands an environment on may stumble over a line's end.
CA_VARIABLE = "GPUPOOL_CA"

#: How long one question for news of a lease may stay unanswered, in seconds.
_NEWS_S = 1.0
_ATTEMPTS = 3


def find_pool(
    url: str | None = None,
    token: str | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    patience_s: float = 2.0,
) -> tuple[PoolClient, dict[str, Any]]:
    """A client of the pool to ask, and what the pool said of itself (``GET pool``).

    ``url``, else ``GPUPOOL_URL``, else the servers of the bundle that was copied here, else the pool that this
    user runs, else one that is started; ``say`` is told what takes longer than a moment. Raises PoolUnreachable
    and other PoolErrors.
    """
    url = url or os.environ.get(URL_VARIABLE)
    given = bundle.find()
    token = token or os.environ.get(TOKEN_VARIABLE, "")
    if url:
        ours = given is not None and given.covers(url)
        if given is None or not ours:
            return _greeted(PoolClient(url, token, patience_s=patience_s, ca=ca_for(url)))
        token = token or given.token
        return _greeted(PoolClient(url, token, patience_s=patience_s, ca=given.ca, also=given.urls))
    if given is not None:
        token, (first, *others) = token or given.token, given.urls
        return _greeted(PoolClient(first, token, patience_s=patience_s, ca=given.ca, also=others))
    for attempt in range(_ATTEMPTS):
        address = discovery.find_or_start(say)
        # One that was found may be about to end, with the work that it was started for.
        client = PoolClient(address.url, address.token, patience_s=patience_s)
        try:
            return client, _greet(client)
        except PoolUnreachable:
            if attempt == _ATTEMPTS - 1:
                raise
            say("The GPU pool has just ended; looking for another one")
    raise AssertionError("unreachable")


def ca_for(url: str) -> str:
    """What the environment says of the authority of the pool at that address (PEM); empty where it says nothing."""
    text = os.environ.get(CA_VARIABLE, "") if url == os.environ.get(URL_VARIABLE) else ""
    try:
        return ssl.DER_cert_to_PEM_cert(base64.b64decode(text, validate=True)) if text else ""
    except ValueError:
        raise InvalidRequest(f"{CA_VARIABLE} holds no certificate; unset it, or set it again") from None


def _greeted(client: PoolClient) -> tuple[PoolClient, dict[str, Any]]:
    return client, _greet(client)


def _greet(client: PoolClient) -> dict[str, Any]:
    try:
        return client.pool()
    except BaseException:
        client.close()
        raise


def running_pool(patience_s: float = 2.0) -> PoolClient | None:
    """A client of the pool that :func:`find_pool` would find running; None where it would start one."""
    if not os.environ.get(URL_VARIABLE) and bundle.find() is None and discovery.find() is None:
        return None
    return find_pool(patience_s=patience_s)[0]


def new_request(
    *,
    num_gpus: int = 1,
    partial: float | None = None,
    memory_mib: int | None = None,
    filters: Mapping[str, str] | None = None,
    spread: bool = False,
    wait: bool = True,
    label: str = "",
    kernel: str = "",
) -> tuple[Request, str]:
    """A request with an id of its own, and the secret whose digest it carries.

    ``kernel``: the id of the kernel that it is for; default: this process, if it is one.

    Without ``partial`` and ``memory_mib`` it asks for whole GPUs. The pool checks the rest. Raises InvalidRequest.
    """
    secret = secrets.token_urlsafe(32)
    if partial is None and memory_mib is None:
        partial = 1.0
    check_memory(partial, memory_mib)  # what is no number has no JSON either
    if filters is not None and not isinstance(filters, Mapping):
        raise InvalidRequest(f"filters are names with values, such as {{'name': 'V100'}}, not {filters!r:.60}")
    request = Request(
        id=str(uuid.uuid4()),
        owner="",  # the pool knows who calls
        num_gpus=num_gpus,
        partial=partial,
        memory_mib=memory_mib,
        filters=dict(filters or {}),
        spread=spread,
        wait=wait,
        secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
        label=label,
        client=f"{socket.gethostname()}:{os.getpid()}{_kernel_mark(kernel)}",
    )
    return request, secret


def _kernel_mark(kernel: str) -> str:
    """By which a frontend tells which notebook a lease belongs to."""
    if not kernel:
        application = getattr(sys.modules.get("ipykernel.kernelapp"), "IPKernelApp", None)
        if application is None or not application.initialized():
            return ""
        kernel = Path(application.instance().connection_file).stem.removeprefix("kernel-")
    return f" kernel:{kernel[:64]}" if kernel.isprintable() else ""


def check_timeout(timeout_s: object) -> None:
    """Raise InvalidRequest unless it is None, for ever, or a number of seconds."""
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s >= 0:
        raise InvalidRequest(f"the timeout must be seconds from 0 up, not {timeout_s!r:.60}")


def acquire(
    client: PoolClient,
    request: Request,
    *,
    news: Callable[[Lease], None] = lambda lease: None,
    timeout_s: float | None = None,
) -> Lease:
    """Make the request and wait until its worker is up.

    ``news`` is called about once a second with the lease as it is then. ``timeout_s`` is the longest wait
    in the queue. Raises what the pool refuses, NoCapacity after ``timeout_s``, and LeaseEnded with the reason
    when it came to nothing. Whatever is raised (KeyboardInterrupt too), nothing stays requested.
    """
    check_timeout(timeout_s)
    began = beaten = time.monotonic()
    try:
        lease = client.request(request)
        while True:
            news(lease)
            if lease.state is LeaseState.ACTIVE:
                return lease
            if lease.state.ended:
                raise LeaseEnded(_how_it_ended(lease))
            now = time.monotonic()
            queued_s = now - began
            if timeout_s is not None and lease.state is LeaseState.QUEUED and queued_s >= timeout_s:
                raise NoCapacity(f"no GPUs within {timeout_s:g} s: position {lease.position} in the queue")
            if now - beaten > lease.ttl_s / 4:
                lease, beaten = client.heartbeat(lease.id), now
            else:
                lease = client.wait(lease.id, lease, _NEWS_S)
    except BaseException:
        with contextlib.suppress(PoolError):  # never got there, or ended already; else its TTL ends it
            client.release(request.id)
        raise


def _how_it_ended(lease: Lease) -> str:
    return f"lease {lease.id} has ended ({lease.state.value}): {lease.reason or 'no reason is known'}"


def refuse_direct(pool: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if no GPU of that pool could be attached directly from this machine."""
    gpus = [gpu for server in pool["servers"] for gpu in server["gpus"]]
    if gpus and all(gpu["emulated"] for gpu in gpus):
        raise InvalidRequest(
            "emulated GPUs cannot be attached directly, and the pool has no others; use remote attachment"
        )
    if not local_uuids() & {gpu["uuid"] for gpu in gpus}:
        raise InvalidRequest("none of the pool's GPUs is in this machine; use remote attachment")


def local_uuids() -> set[str]:
    """The GPUs that NVML finds in this machine."""
    return {gpu.uuid for gpu in nvml_gpus("localhost")}


def attach_mode(wanted: str, lease: Lease) -> str:
    """How to use a granted lease: "direct" where every slice is of a GPU of this machine and the wish
    allows it, else "remote". Raises InvalidRequest where "direct" is wanted and cannot be."""
    if wanted == "remote":
        return "remote"
    emulated = any(piece.emulated for piece in lease.slices)
    if not emulated and {piece.gpu_uuid for piece in lease.slices} <= local_uuids():
        return "direct"
    if wanted == "direct":
        why = "they are emulated" if emulated else "they are in another machine"
        raise InvalidRequest(
            f"the granted GPUs cannot be attached directly, for {why}; use remote attachment"
        )
    return "remote"


def attach_spec(client: PoolClient, lease: Lease, secret: str, mode: str) -> AttachSpec:
    """What a process needs to use an ACTIVE lease: as safe a way to its workers as the one to its pool."""
    assert lease.worker is not None, "an ACTIVE lease has a worker"
    devices = tuple(
        DeviceSpec(index, s.gpu_uuid, s.name, s.memory_mib, s.total_mib, s.emulated)
        for index, s in enumerate(lease.slices)
    )
    where = (lease.worker.host, lease.worker.port)
    workers = [lease.worker.on(piece.server) for piece in lease.slices] if lease.worker.elsewhere else []
    addresses = tuple((worker.host, worker.port) for worker in workers)
    return AttachSpec(
        lease.id, *where, secret, devices, lease.ttl_s, mode, client.secure, client.ca, addresses
    )


def resized_spec(spec: AttachSpec, lease: Lease) -> AttachSpec:
    """The same attachment with the limits that the lease has now."""
    mib = {piece.gpu_uuid: piece.memory_mib for piece in lease.slices}
    devices = tuple(replace(d, limit_mib=mib.get(d.uuid, d.limit_mib)) for d in spec.devices)
    return replace(spec, devices=devices)


def write_config(path: Path, spec: AttachSpec) -> None:
    """Put the file that GPUPOOL_LEASE names in its place, whole at once. Raises OSError."""
    # Where anybody may write, somebody else may have put something by a name that can be foretold.
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as f:
            f.write(spec.to_json())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def refuse_smaller(
    spec: AttachSpec, in_use: list[int], partial: float | None, memory_mib: int | None
) -> None:
    """Raise InUse where a slice has more in use than it is to have; ``in_use`` is in MiB, in device order."""
    check_memory(partial, memory_mib)
    for device, used in zip(spec.devices, in_use):
        wanted = memory_mib if memory_mib is not None else int((partial or 0) * device.total_mib)
        if used > wanted:
            raise InUse(
                f"cuda:{device.index} has {used} MiB in use and cannot be made smaller than that; "
                "delete tensors, or move them to the CPU"
            )


def visible_devices(spec: AttachSpec) -> str:
    """What CUDA_VISIBLE_DEVICES has to be for a direct attachment."""
    return ",".join(device.uuid for device in spec.devices)


def new_config() -> Path:
    """A new temporary file, empty and readable by this user alone, that GPUPOOL_LEASE can name. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix="gpupool")
    os.close(handle)
    return Path(name)


class Hold:
    """An ACTIVE lease with this process as its holder, until :meth:`release` or the end of the process.

    ``on_lost`` is called once, from another thread, with one line, when the lease ends without us;
    ``on_resized`` with the new limits, from another thread too, when somebody else has resized it.
    Raises PoolError, after giving the lease back, when its worker cannot be reached.
    """

    def __init__(
        self,
        client: PoolClient,
        lease: Lease,
        spec: AttachSpec,
        on_lost: Callable[[str], None] | None = None,
        on_resized: Callable[[AttachSpec], None] | None = None,
    ) -> None:
        self.lease = lease
        self.spec = spec
        self._client = client
        self._on_lost = on_lost
        self._on_resized = on_resized
        self._lock = threading.Lock()
        self._resizing = threading.Lock()
        self._lost = ""
        self._over = threading.Event()
        self._released = False
        self._pid = os.getpid()
        try:
            with _unsignalled():
                self._lifeline = Lifeline(spec, self._lose)
                self._beats = threading.Thread(target=self._beat, name="gpupool-heartbeat", daemon=True)
                self._beats.start()
        except (Refused, OSError, WireError) as e:
            with contextlib.suppress(PoolError):
                client.release(lease.id)
            raise LeaseEnded(f"the worker of lease {lease.id} cannot be reached: {e}") from None

    @property
    def lost(self) -> str:
        """Why the lease ended without us; empty while it has not."""
        return self._lost

    def release(self) -> None:
        """Give the lease back and return once its share is free (or the pool cannot be asked: then it is
        free as soon as the worker, who is told first, has ended). In a fork: do nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._released:
                return
            self._released = True
            self._over.set()
        self._lifeline.release()
        with contextlib.suppress(PoolError):
            self._client.release(self.lease.id)
        self._client.close()

    def resize(self, partial: float | None = None, memory_mib: int | None = None) -> AttachSpec:
        """Another share of the same GPUs. Raises PoolError; then everything is as it was."""
        with self._resizing:
            lease = self._client.resize(self.lease.id, partial, memory_mib)
            self.spec = resized_spec(self.spec, lease)
            return self.spec

    def reason(self, patience_s: float = 2.0) -> str:
        """What the pool knows of the end of a lost lease: more than its lifeline does."""
        deadline = time.monotonic() + patience_s
        try:
            lease = self._client.lease(self.lease.id)
            while not lease.state.ended and time.monotonic() < deadline:
                lease = self._client.wait(lease.id, lease, max(0.0, deadline - time.monotonic()))
        except PoolError:
            return self._lost
        return lease.reason if lease.state.ended and lease.reason else self._lost

    def state(self) -> LeaseState:
        """What became of the lease, as far as the pool can be asked."""
        if not self._over.is_set():
            return LeaseState.ACTIVE
        if not self._lost:
            return LeaseState.RELEASED
        try:
            lease = self._client.lease(self.lease.id)
        except (PoolError, RuntimeError):  # RuntimeError: the client was closed by release()
            return LeaseState.LOST
        return lease.state if lease.state.ended else LeaseState.LOST

    def _beat(self) -> None:
        while not self._over.wait(self.lease.ttl_s / 4):
            try:
                self._follow(self._client.heartbeat(self.lease.id))
            except (LeaseEnded, UnknownLease) as e:
                self._lose(str(e))
            except PoolError:
                pass  # away, perhaps just restarting; the worker goes on as long as the lifeline stands
            except RuntimeError:
                return  # the client was closed: released meanwhile

    def _follow(self, lease: Lease) -> None:
        with self._resizing:
            spec = resized_spec(self.spec, lease)
            if spec == self.spec:
                return
            self.spec = spec
        if self._on_resized is not None:
            self._on_resized(spec)

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._lost = reason
            self._over.set()
        if self._on_lost is not None:
            self._on_lost(reason)


@contextlib.contextmanager
def _unsignalled() -> Iterator[None]:
    """Threads that are started within leave all signals to the main thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
