"""TLS 1.3 to a worker, over a connection that two threads may use at once, as they may use a plain socket.

The client names the lease in its first message (as an application protocol, RFC 7301), so that the acceptor on a GPU
server's single port can hand the connection to the right worker. Only the worker speaks TLS.

A worker has a key and a certificate of its own, which nobody has signed: no worker has its server's key. So TLS by
itself says nothing of who the other end is. Both ends prove that with the lease's secret, see proofs.py.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import ssl
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .polling import READABLE, WRITABLE, Poll, new_poll

#: Prefix of the lease's id in the name of the application protocol; and that of workers which showed their server's
#: certificate.
_PREFIX = "gpupool-worker/"
_FORMER_PREFIX = "gpupool-lease/"
#: The most bytes that a record of TLS carries, and the most records that one call reads.
_RECORD_BYTES = 16384
_MAX_RECORDS = 16
#: The longest id of a lease, in characters.
_MAX_ID_LENGTH = 64


def protocol_of(lease_id: str) -> str:
    """Return the name of the application protocol that requests that lease's worker."""
    return f"{_PREFIX}{lease_id}"


def offered_for(lease_id: str) -> list[str]:
    """Return the names that a client offers. A worker of an earlier version selects the second, and is refused."""
    return [protocol_of(lease_id), f"{_FORMER_PREFIX}{lease_id}"]


def lease_of(protocol: bytes) -> str | None:
    """Return the lease that the application protocol names; None if it names none."""
    for prefix in (_PREFIX.encode(), _FORMER_PREFIX.encode()):
        name = protocol[len(prefix) :]
        if protocol.startswith(prefix) and 0 < len(name) <= _MAX_ID_LENGTH:
            return name.decode("ascii") if name.replace(b"-", b"").isalnum() else None
    return None


def is_former(protocol: bytes) -> bool:
    """Return whether the application protocol requests a worker that shows its server's certificate."""
    return protocol.startswith(_FORMER_PREFIX.encode())


def client_context() -> ssl.SSLContext:
    """Return a context that accepts every certificate: who the worker is, it proves afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def server_context(certfile: str, keyfile: str) -> ssl.SSLContext:
    """Return a context with that certificate and key. Raises OSError, also ssl.SSLError, for unusable files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no client resumes, and tickets would wake a client that waits for a frame
    context.load_cert_chain(certfile, keyfile)
    return context


class OwnCertificate:
    """A worker's certificate and key, read at once from two PEM files. Raises OSError, also ssl.SSLError.

    ``digest``: SHA-256 of the certificate, as :attr:`SecureSocket.digest` of its clients.
    """

    def __init__(self, certfile: str, keyfile: str) -> None:
        self.context = server_context(certfile, keyfile)
        first, end, _ = Path(certfile).read_text().partition(ssl.PEM_FOOTER)
        self.digest = _digest(ssl.PEM_cert_to_DER_cert(first[first.index(ssl.PEM_HEADER) :] + end))


def _digest(certificate: bytes) -> bytes:
    return hashlib.sha256(certificate).digest()


class SecureSocket:
    """A TLS connection with as much of a socket's interface as the data plane uses.

    OpenSSL allows one call at a time for a connection, and Python before 3.13 does not ensure that. So every call is
    made under a lock, and none blocks while it holds the lock.

    ``certificate``: the worker's own, at its end.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        server_hostname: str | None = None,
        certificate: OwnCertificate | None = None,
    ) -> None:
        self._timeout = sock.gettimeout()
        self._lock = threading.Lock()
        self._ssl = context.wrap_socket(
            sock,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
            do_handshake_on_connect=False,
        )
        #: SHA-256 of the worker's certificate, whose key the worker has; a client knows it after the handshake
        self.digest = certificate.digest if certificate else b""
        #: the name of the application protocol that the worker has selected; None before the handshake
        self.protocol: str | None = None
        # Only one thread reads at a time, so this poll object can be shared; writers create their own.
        self._readable = new_poll()

    def handshake(self) -> None:
        """Run the whole TLS handshake within the timeout. Raises OSError."""
        self._ssl.settimeout(self._timeout)
        self._ssl.do_handshake()
        self.protocol = self._ssl.selected_alpn_protocol()
        if not self._ssl.server_side:
            self.digest = _digest(self._ssl.getpeercert(True) or b"")
        self._ssl.setblocking(False)
        self._readable.register(self._ssl, READABLE)

    # -- the interface of a socket

    def fileno(self) -> int:
        return self._ssl.fileno()

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._ssl.setsockopt(level, option, value)

    def recv_into(self, view: memoryview) -> int:
        deadline = self._deadline()
        while True:
            # A read without data costs an exception, so poll before asking OpenSSL.
            if not self.pending():
                self._wait(self._readable, deadline)
            try:
                with self._lock:
                    return self._read(view)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLWantWriteError:
                self._wait(self._to_write(), deadline)
            except ssl.SSLZeroReturnError:
                return 0
            except ValueError:
                raise _closed() from None

    def _read(self, view: memoryview) -> int:
        """Read a record, and after a full one those that have arrived besides: to poll for each takes longer."""
        done = 0
        for _ in range(_MAX_RECORDS):
            try:
                n: int = self._ssl.read(len(view) - done, view[done:])  # type: ignore[assignment]  # with a buffer, a count
            except OSError:
                if done:
                    break  # what it is about, the next call learns, too
                raise
            done += n
            if n < _RECORD_BYTES or done == len(view):
                break
        return done

    def sendall(self, data: Any) -> None:
        rest = memoryview(data)
        while len(rest):
            rest = rest[self.send(rest) :]

    def send(self, data: Any) -> int:
        """Send some of the bytes, and return how many."""
        deadline = self._deadline()
        while True:
            try:
                with self._lock:
                    return self._ssl.send(data)
            except ssl.SSLWantWriteError:
                self._wait(self._to_write(), deadline)
            except ssl.SSLWantReadError:  # never with TLS 1.3, whose peers do not renegotiate
                continue
            except ValueError:
                raise _closed() from None

    def shutdown(self, how: int) -> None:
        # Not SSLSocket.shutdown, after which the socket would send plain text.
        socket.socket.shutdown(self._ssl, how)

    def detach(self) -> int:
        return self._ssl.detach()

    def close(self) -> None:
        self._ssl.close()

    def __enter__(self) -> SecureSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- additions

    def pending(self) -> bool:
        """Return whether OpenSSL holds data that has left the system's buffers already."""
        with self._lock:
            try:
                return self._ssl.pending() > 0
            except (OSError, ValueError):
                return False

    def _to_write(self) -> Poll:
        poll = new_poll()
        if self.fileno() >= 0:
            poll.register(self._ssl, WRITABLE)
        return poll

    def _deadline(self) -> float | None:
        return None if self._timeout is None else time.monotonic() + self._timeout

    def _wait(self, until: Poll, deadline: float | None) -> None:
        if self.fileno() < 0:
            raise _closed()
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not until.poll(left):
            raise TimeoutError("timed out")


def _closed() -> OSError:
    return OSError(errno.EBADF, "the connection was closed")


Connection = socket.socket | SecureSocket


def readable(sock: Connection, poll: Poll, timeout_ms: float) -> bool:
    """Wait up to ``timeout_ms`` and return whether there is data to read. ``sock`` is registered with ``poll``."""
    return (type(sock) is SecureSocket and sock.pending()) or bool(poll.poll(timeout_ms))
