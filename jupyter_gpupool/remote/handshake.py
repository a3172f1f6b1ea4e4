"""How a client and a worker meet: one connection, one role, one secret."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
from typing import Any

from . import wire
from .specs import PROTOCOL, AttachSpec, WorkerSpec

#: A session streams operators; a holder keeps the lease alive and sends nothing but pings.
ROLES = ("session", "holder")


class Refused(Exception):
    """The worker would not admit this client; the text says why."""


def connect(
    spec: AttachSpec, role: str, facts: dict[str, Any], timeout_s: float = 10.0
) -> tuple[socket.socket, dict]:
    """Open a connection to the lease's worker and return it with the worker's welcome.

    Raises :class:`Refused`, or :class:`~.wire.ConnectionLost` where no worker answers.
    """
    try:
        sock = socket.create_connection((spec.host, spec.port), timeout=timeout_s)
    except OSError as e:
        raise wire.ConnectionLost(
            f"no worker answers for lease {spec.lease_id} at {spec.host}:{spec.port} ({e}); has the lease ended?"
        ) from e
    try:
        wire.tune(sock, spec.ttl_s)
        hello = {"protocol": PROTOCOL, "secret": spec.secret, "role": role, "pid": os.getpid(), **facts}
        wire.send(sock, wire.Kind.HELLO, hello)
        kind, welcome, _ = wire.receive(sock)
        if kind is wire.Kind.REFUSED:
            raise Refused(welcome["message"])
        if kind is not wire.Kind.WELCOME:
            raise wire.WireError(f"expected a welcome, got {kind.name}")
        sock.settimeout(None)
        return sock, welcome
    except BaseException:
        sock.close()
        raise


def admit(
    sock: socket.socket, spec: WorkerSpec, facts: dict[str, Any], timeout_s: float = 5.0
) -> dict[str, Any]:
    """The worker's side: check who is there, answer, and return the client's hello.

    Raises :class:`Refused` after telling the client, :class:`~.wire.WireError` or
    :class:`~.wire.ConnectionLost` for those that are no clients at all.
    """
    sock.settimeout(timeout_s)
    wire.tune(sock, spec.ttl_s)
    try:
        kind, hello, payload = wire.receive(sock, wire.MAX_HELLO)
    except TimeoutError as e:
        raise wire.ConnectionLost("said nothing") from e
    if kind is not wire.Kind.HELLO or payload or not isinstance(hello, dict):
        raise wire.WireError("expected a hello")
    reason = _objection(hello, spec, facts)
    if reason:
        wire.send(sock, wire.Kind.REFUSED, {"message": reason})
        raise Refused(reason)
    wire.send(sock, wire.Kind.WELCOME, {"protocol": PROTOCOL, **facts})
    sock.settimeout(None)
    return hello


def _objection(hello: dict, spec: WorkerSpec, facts: dict[str, Any]) -> str:
    secret = hello.get("secret")
    digest = hashlib.sha256(secret.encode()).hexdigest() if isinstance(secret, str) else ""
    if not hmac.compare_digest(digest, spec.secret_sha256):
        return "the secret is not this lease's"
    if hello.get("protocol") != PROTOCOL:
        return (
            f"this client speaks protocol {hello.get('protocol')!r}, the worker {PROTOCOL}; "
            "install the same version of jupyter-gpupool on both"
        )
    if hello.get("role") not in ROLES:
        return f"unknown role {hello.get('role')!r}"
    if hello["role"] == "session":
        ours, theirs = facts["torch"], hello.get("torch")
        if not isinstance(theirs, str) or release(theirs) != release(ours):
            return (
                f"this client has PyTorch {theirs}, the GPU server {ours}; install the same release on both"
            )
    return ""


def release(version: str) -> tuple[str, ...]:
    """The part of a PyTorch version that must agree: ``"2.13.0+cpu"`` → ``("2", "13")``."""
    return tuple(version.split("+")[0].split(".")[:2])
