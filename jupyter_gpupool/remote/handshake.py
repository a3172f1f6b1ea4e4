"""How a client and a worker meet: one connection, one role, one secret."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import ssl
from typing import Any

from . import tls, wire
from .specs import PROTOCOL, AttachSpec, WorkerSpec

#: A session streams operators; a holder keeps the lease alive and sends nothing but pings.
ROLES = ("session", "holder")


class Refused(Exception):
    """The worker would not admit this client; the text says why."""


def connect(
    spec: AttachSpec, role: str, facts: dict[str, Any], timeout_s: float = 10.0
) -> tuple[tls.Connection, dict]:
    """Open a connection to the lease's worker and return it with the worker's welcome.

    Raises :class:`Refused`, or :class:`~.wire.ConnectionLost` where no worker answers.
    """
    try:
        sock = socket.create_connection((spec.host, spec.port), timeout=timeout_s)
    except OSError as e:
        raise wire.ConnectionLost(
            f"no worker answers for lease {spec.lease_id} at {spec.host}:{spec.port} ({e}); has the lease ended?"
        ) from e
    wire.tune(sock, spec.ttl_s)
    conn = _secured(sock, spec) if spec.secure else sock
    try:
        hello = {"protocol": PROTOCOL, "secret": spec.secret, "role": role, "pid": os.getpid(), **facts}
        wire.send(conn, wire.Kind.HELLO, hello)
        kind, welcome, _ = wire.receive(conn)
        if kind is wire.Kind.REFUSED:
            raise Refused(welcome["message"])
        if kind is not wire.Kind.WELCOME:
            raise wire.WireError(f"expected a welcome, got {kind.name}")
        conn.settimeout(None)
        return conn, welcome
    except BaseException:
        conn.close()
        raise


def _secured(sock: socket.socket, spec: AttachSpec) -> tls.SecureSocket:
    where = f"{spec.host}:{spec.port}"
    try:
        context = tls.client_context(spec.ca)
        context.set_alpn_protocols([tls.protocol_of(spec.lease_id)])
        conn = tls.SecureSocket(sock, context, spec.host)
        try:
            conn.handshake()
        except BaseException:
            conn.close()
            raise
        return conn
    except ssl.SSLCertVerificationError as e:
        raise Refused(
            f"the GPU server at {where} shows a certificate that this client does not trust "
            f"({e.verify_message}); get a new ca.crt from the pool's administrator, or check the address"
        ) from None
    except ssl.SSLError as e:
        if "no application protocol" in str(e).lower().replace(
            "_", " "
        ):  # not all of OpenSSL's have a reason
            why = f"no worker answers for lease {spec.lease_id} at {where}; has the lease ended?"
        else:
            why = f"no TLS 1.3 with the GPU server at {where} ({e.reason or e})"
        raise wire.ConnectionLost(why) from None
    except OSError as e:
        raise wire.ConnectionLost(f"the GPU server at {where} hung up ({e}); has the lease ended?") from None
    finally:
        sock.close()  # a wrapped one has passed its connection on


def secured(sock: socket.socket, spec: WorkerSpec, timeout_s: float = 5.0) -> tls.SecureSocket:
    """The worker's side of TLS; the certificate may be another one than last time. Raises OSError."""
    try:
        context = tls.server_context(spec.certfile, spec.keyfile)
        context.set_alpn_protocols([tls.protocol_of(spec.lease_id)])
        sock.settimeout(timeout_s)
        conn = tls.SecureSocket(sock, context)
    finally:
        sock.close()
    try:
        conn.handshake()
    except BaseException:
        conn.close()
        raise
    return conn


def admit(
    sock: tls.Connection, spec: WorkerSpec, facts: dict[str, Any], timeout_s: float = 5.0
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
