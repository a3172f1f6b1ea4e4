"""The handshake between a client and a worker: one connection, one role, one secret.

Over TLS the secret is sealed, and the worker proves itself, see proofs.py; without TLS, on one machine, it is plain.
"""

from __future__ import annotations

import hmac
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from . import client_hello, frames, proofs, tls
from .resumption import BadNumbers
from .specs import PROTOCOL, AttachSpec, WorkerSpec
from .timed_socket import TimedSocket

#: The pauses between attempts to make a first connection, in seconds.
_FIRST_PAUSES_S = (0.02, 0.1, 0.5)
#: A session sends operators; a holder keeps the lease alive and sends only pings; another worker of the lease sends
#: the lease's whole state. A peer is a worker with other slices of the lease, whose ranks exchange tensors with those
#: here.
ROLES = ("session", "holder", "worker", "peer")
#: The longest answer to a hello, in bytes. Who sends it has proven nothing yet.
_MAX_WELCOME = 1 << 20
_MAX_REASON_CHARACTERS = 1000
#: A fatal TLS alert: "protocol version". A client of an earlier version reports it as it is.
_OTHER_VERSION = bytes((21, 3, 3, 0, 2, 2, 70))


class Refused(Exception):
    """The worker refused this client; the message is the reason."""


class MovedAway(ConnectionError):
    """The lease goes on with another worker, at this address."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"the lease has moved to {host}:{port}")
        self.host = host
        self.port = port


def moved_to(header: Any) -> MovedAway | None:
    """What the header of a BYE or REFUSED says of a lease that has moved; None where it says nothing of it."""
    where = header.get("moved") if isinstance(header, dict) else None
    if (
        isinstance(where, list)
        and len(where) == 2
        and isinstance(where[0], str)
        and type(where[1]) is int
        and 0 < where[1] < 65536
    ):
        return MovedAway(where[0], where[1])
    return None


def connect(
    spec: AttachSpec,
    role: str,
    facts: dict[str, Any],
    timeout_s: float = 10.0,
    sock: socket.socket | None = None,
) -> tuple[tls.Connection, dict[str, Any]]:
    """Connect to the lease's worker; return the connection and the worker's welcome.

    ``sock``: a connection to there, for a process that may make none.
    Raises :class:`Refused`, or :class:`~.frames.ConnectionLost` if no worker answers; :class:`~.frames.NoWorker` if
    its GPU server says that there is none; :class:`MovedAway` if the lease goes on elsewhere.
    """
    try:
        if sock is None:
            sock = socket.create_connection((spec.host, spec.port), timeout=timeout_s)
        else:
            sock.settimeout(timeout_s)
    except OSError as e:
        failure = frames.NoWorker if isinstance(e, ConnectionRefusedError) else frames.Unreachable
        raise failure(
            f"no worker answers for lease {spec.lease_id} at {spec.host}:{spec.port} ({e}); has the lease ended?"
        ) from e
    frames.tune(sock, spec.ttl_s)
    conn: tls.Connection = _secured(sock, spec) if spec.secure else TimedSocket(sock)
    try:
        hello = {
            "protocol": PROTOCOL,
            **_secret_for(conn, spec.secret),
            "role": role,
            "pid": os.getpid(),
            "follows": True,  # to wherever the lease moves
            "waits": True,  # while there are signs of life
            **facts,
        }
        frames.send(conn, frames.Kind.HELLO, hello)
        kind = frames.Kind.PING
        while kind is frames.Kind.PING:  # the worker is setting up its GPUs
            kind, welcome, _ = frames.receive(conn, _MAX_WELCOME)
        if kind is frames.Kind.REFUSED:
            raise moved_to(welcome) or Refused(_reason(welcome))
        if kind is not frames.Kind.WELCOME or not isinstance(welcome, dict):
            raise frames.WireError(f"expected a welcome, got {kind.name}")
        if isinstance(conn, tls.SecureSocket) and not proofs.proves(
            welcome.pop("proof", None), spec.secret, conn.digest
        ):
            raise Refused(
                f"who answers at {spec.host}:{spec.port} does not prove to be the worker of lease {spec.lease_id}; "
                "somebody may be intercepting the connection"
            )
        conn.settimeout(None)
        return conn, welcome
    except BaseException:
        conn.close()
        raise


def connect_first(
    connect: Callable[[], tuple[tls.Connection, dict[str, Any]]],
) -> tuple[tls.Connection, dict[str, Any]]:
    """Call ``connect`` for a connection that has none before it, and again where it is lost before the welcome.

    Raises what ``connect`` raises: at once where nobody answers or the answer is no, else after a few attempts.
    """
    for pause_s in _FIRST_PAUSES_S:
        try:
            return connect()
        except (frames.Unreachable, frames.NoWorker, TimeoutError):
            raise
        except ConnectionError:
            time.sleep(pause_s)
    return connect()


def _reason(header: Any) -> str:
    """Why a worker refuses, as far as it is a line for people."""
    said = str(header.get("message", "")) if isinstance(header, dict) else ""
    return (
        "".join(c if c.isprintable() else " " for c in said[:_MAX_REASON_CHARACTERS]) or "no reason is given"
    )


def _secret_for(conn: tls.Connection, secret: str) -> dict[str, Any]:
    if isinstance(conn, tls.SecureSocket):
        return {"sealed": proofs.seal(secret, conn.digest)}
    return {"secret": secret}


def _secured(sock: socket.socket, spec: AttachSpec) -> tls.SecureSocket:
    where = f"{spec.host}:{spec.port}"
    try:
        context = tls.client_context()
        context.set_alpn_protocols(tls.offered_for(spec.lease_id))
        conn = tls.SecureSocket(sock, context, spec.host)
        try:
            conn.handshake()
            if conn.protocol != tls.protocol_of(spec.lease_id):
                raise Refused(
                    f"the worker of lease {spec.lease_id} at {where} is of an earlier version; install the same "
                    "version of jupyter-gpupool on both"
                )
        except BaseException:
            conn.close()
            raise
        return conn
    except ssl.SSLError as e:
        # Not all of OpenSSL's errors have a reason.
        if "no application protocol" in str(e).lower().replace("_", " "):
            raise frames.NoWorker(
                f"no worker answers for lease {spec.lease_id} at {where}; has the lease ended?"
            ) from None
        raise frames.ConnectionLost(f"no TLS 1.3 with the GPU server at {where} ({e.reason or e})") from None
    except OSError as e:
        raise frames.ConnectionLost(
            f"the GPU server at {where} closed the connection ({e}); has the lease ended?"
        ) from None
    finally:
        sock.close()  # a wrapped socket has handed its connection over


def secured(
    sock: socket.socket, spec: WorkerSpec, certificate: tls.OwnCertificate, timeout_s: float = 5.0
) -> tls.SecureSocket:
    """Run the worker's side of TLS. Raises OSError."""
    try:
        sock.settimeout(timeout_s)
        if client_hello.is_of_earlier_version(sock.recv(client_hello.MOST, socket.MSG_PEEK)):
            sock.recv(client_hello.MOST)  # unread bytes would turn the alert into a reset
            sock.send(_OTHER_VERSION)
            raise ConnectionError("the client is of an earlier version")
        certificate.context.set_alpn_protocols([tls.protocol_of(spec.lease_id)])
        conn = tls.SecureSocket(sock, certificate.context, certificate=certificate)
    finally:
        sock.close()
    try:
        conn.handshake()
    except BaseException:
        conn.close()
        raise
    return conn


def admit(
    sock: tls.Connection,
    spec: WorkerSpec,
    facts: dict[str, Any],
    timeout_s: float = 5.0,
    resume: Callable[[dict[str, Any]], dict[str, Any]] = lambda hello: {},
) -> dict[str, Any]:
    """Run the worker's side: authenticate the client, answer, and return its hello, with its secret.

    ``resume`` is called with the hello of an authenticated client. It returns more fields of the welcome, or raises
    BadNumbers, Refused or MovedAway. Raises :class:`Refused` after notifying the client, and
    :class:`~.frames.WireError` or
    :class:`~.frames.ConnectionLost` if the other end is not a client.
    """
    sock.settimeout(timeout_s)
    frames.tune(sock, spec.ttl_s)
    try:
        kind, hello, payload = frames.receive(sock, frames.MAX_HELLO)
    except TimeoutError as e:
        raise frames.ConnectionLost("no hello arrived") from e
    if kind is not frames.Kind.HELLO or payload or not isinstance(hello, dict):
        raise frames.WireError("expected a hello")
    if isinstance(sock, tls.SecureSocket):
        hello["secret"] = proofs.unseal(hello.get("sealed"), spec.secret_sha256, sock.digest)
    reason = _objection(hello, spec)
    if hello.get("secret") is None and "sealed" in hello:
        reason += ", or somebody between the client and the worker has intercepted the connection"
    more: dict[str, Any] = {}
    where: dict[str, Any] = {}
    if not reason:
        try:
            more = resume(hello)
        except BadNumbers as e:
            reason = f"the session cannot be resumed: {e}"
        except MovedAway as e:
            reason, where = str(e), {"moved": [e.host, e.port]}
        except Refused as e:
            reason = str(e)
    if reason:
        frames.send(sock, frames.Kind.REFUSED, {"message": reason, **where})
        raise Refused(reason)
    limits: dict[str, Any] = {"resume_s": spec.resume_s, "window_mib": spec.window_mib}
    if isinstance(sock, tls.SecureSocket):
        limits["proof"] = proofs.proof(spec.secret_sha256, sock.digest)
    frames.send(sock, frames.Kind.WELCOME, {"protocol": PROTOCOL, **facts, **limits, **more})
    sock.settimeout(None)
    return hello


def _objection(hello: dict[str, Any], spec: WorkerSpec) -> str:
    secret = hello.get("secret")
    digest = proofs.digest_of(secret) if isinstance(secret, str) else ""
    if not hmac.compare_digest(digest, spec.secret_sha256):
        return "the secret is not this lease's"
    if hello.get("protocol") != PROTOCOL:
        return (
            f"this client speaks protocol {hello.get('protocol')!r}, the worker {PROTOCOL}; "
            "install the same version of jupyter-gpupool on both"
        )
    if hello.get("role") not in ROLES:
        return f"unknown role {hello.get('role')!r}"
    if hello["role"] == "session" and "framework" not in hello and not isinstance(hello.get("torch"), str):
        return "this client does not name its release of PyTorch"
    return ""
