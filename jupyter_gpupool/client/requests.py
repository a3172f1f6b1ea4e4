"""From a request to an ACTIVE lease, and to the description by which a process attaches to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from jupyter_gpupool.core import torch_release
from jupyter_gpupool.core.environment import POD_UID
from jupyter_gpupool.core.errors import InvalidRequest, LeaseEnded, NoCapacity, PoolError
from jupyter_gpupool.core.models import Lease, LeaseState, Request
from jupyter_gpupool.core.validation import check_memory
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from .http import PoolClient

#: How long the pool may hold back its answer while the lease does not change, in seconds.
_UPDATE_INTERVAL_S = 1.0


def new_request(
    *,
    num_gpus: int = 1,
    partial: float | None = None,
    memory_mib: int | None = None,
    filters: Mapping[str, str] | None = None,
    spread: bool = False,
    never_park: bool = False,
    wait: bool = True,
    label: str = "",
    kernel: str = "",
) -> tuple[Request, str]:
    """Return a request with a new id, and the secret whose digest it carries.

    ``partial``: the fraction of each GPU's memory; ``memory_mib``: MiB of each GPU instead; with neither, the request
    is for whole GPUs. ``kernel``: id of the kernel that the GPUs are for (default: this process, if it is a kernel).
    Raises InvalidRequest for values that have no JSON form; the pool checks the rest.
    """
    secret = secrets.token_urlsafe(32)
    if partial is None and memory_mib is None:
        partial = 1.0
    check_memory(partial, memory_mib)
    if filters is not None and not isinstance(filters, Mapping):
        raise InvalidRequest(
            f"filters are names with values, such as {{'name': 'V100'}}, not {filters!r:.60}"
        )
    torch_mark = torch_release.mark(torch_release.installed())
    request = Request(
        id=str(uuid.uuid4()),
        owner="",  # the pool knows it from the token
        num_gpus=num_gpus,
        partial=partial,
        memory_mib=memory_mib,
        filters=dict(filters or {}),
        spread=spread,
        never_park=never_park,
        wait=wait,
        secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
        label=label,
        # A frontend expects the kernel at the end.
        client=f"{socket.gethostname()}:{os.getpid()}{torch_mark}{_pod_mark()}{_kernel_mark(kernel)}",
    )
    return request, secret


def _pod_mark() -> str:
    """Return the mark by which a cluster finds the Pod of a lease: its uid, for its name may be another's next."""
    uid = os.environ.get(POD_UID, "")
    return f" pod:{uid}" if re.fullmatch(r"[0-9A-Za-z-]{1,36}", uid) else ""


def _kernel_mark(kernel: str) -> str:
    """Return the suffix by which a frontend finds the notebook of a lease; empty outside a kernel."""
    if not kernel:
        application = getattr(sys.modules.get("ipykernel.kernelapp"), "IPKernelApp", None)
        if application is None or not application.initialized():
            return ""
        kernel = Path(application.instance().connection_file).stem.removeprefix("kernel-")
    return f" kernel:{kernel[:64]}" if kernel.isprintable() else ""


def check_timeout(timeout_s: object) -> None:
    """Raise InvalidRequest unless ``timeout_s`` is a number of seconds from 0 up, or None for no limit."""
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s >= 0:
        raise InvalidRequest(f"the timeout must be seconds from 0 up, not {timeout_s!r:.60}")


def acquire(
    client: PoolClient,
    request: Request,
    *,
    on_update: Callable[[Lease], None] = lambda lease: None,
    timeout_s: float | None = None,
) -> Lease:
    """Send the request and return the lease once it is ACTIVE: granted, with its worker running.

    ``on_update`` is called about once a second with the lease. ``timeout_s``: the longest wait in the queue.
    Raises the pool's refusal; NoCapacity after ``timeout_s``; LeaseEnded, with the reason, if the lease ends first.
    On any exception, KeyboardInterrupt included, the request is withdrawn.
    """
    check_timeout(timeout_s)
    began = heartbeat_at = time.monotonic()
    try:
        lease = client.request(request)
        while True:
            on_update(lease)
            if lease.state in (
                LeaseState.ACTIVE,
                LeaseState.PARKED,
            ):  # it may be parked before this is noticed
                return lease
            if lease.state.ended:
                reason = lease.reason or "the pool gives no reason"
                raise LeaseEnded(f"lease {lease.id} has ended ({lease.state.value}): {reason}")
            now = time.monotonic()
            queued_s = now - began
            if timeout_s is not None and lease.state is LeaseState.QUEUED and queued_s >= timeout_s:
                raise NoCapacity(f"no GPUs within {timeout_s:g} s: position {lease.position} in the queue")
            if now - heartbeat_at > lease.ttl_s / 4:
                lease, heartbeat_at = client.heartbeat(lease.id), now
            else:
                lease = client.wait(lease.id, lease, _UPDATE_INTERVAL_S)
    except BaseException:
        with contextlib.suppress(PoolError):  # the pool never got it, or it has ended; else its TTL ends it
            client.release(request.id)
        raise


def attach_spec(client: PoolClient, lease: Lease, secret: str, connection: str) -> AttachSpec:
    """Return what a process needs to use an ACTIVE lease. ``connection``: "remote" or "direct".

    The connection to the workers is TLS if the one to the pool is.
    """
    spec = AttachSpec(lease.id, "", 0, secret, (), lease.ttl_s, connection, client.secure)
    return current_spec(spec, lease)


def current_spec(spec: AttachSpec, lease: Lease) -> AttachSpec:
    """Return ``spec`` with the slices and the workers that the lease has now."""
    devices = tuple(
        DeviceSpec(index, s.gpu_uuid, s.name, s.memory_mib, s.total_mib, s.emulated)
        for index, s in enumerate(lease.slices)
    )
    if lease.worker is None or not devices:
        return spec
    workers = [lease.worker.on(piece.server) for piece in lease.slices] if lease.worker.elsewhere else []
    addresses = tuple((worker.host, worker.port) for worker in workers)
    return replace(spec, host=lease.worker.host, port=lease.worker.port, devices=devices, addresses=addresses)
