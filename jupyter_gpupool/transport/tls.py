"""TLS 1.3 to a worker, over a connection that two threads may use at once, as they may use a plain socket.

The client names the lease in its first message (as an application protocol, RFC 7301), so that the acceptor on a GPU
server's single port can hand the connection to the right worker. Only the worker speaks TLS.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Any

from .polling import READABLE, WRITABLE, Poll, new_poll

#: Prefix of the lease's id in the name of the application protocol.
_PREFIX = "gpupool-lease/"
#: The most bytes that a record of TLS carries, and the most records that one call reads.
_RECORD_BYTES = 16384
_MAX_RECORDS = 16
#: The longest id of a lease, in characters.
_MAX_ID_LENGTH = 64


def protocol_of(lease_id: str) -> str:
    """Return the name of the application protocol that requests that lease's worker."""
    return f"{_PREFIX}{lease_id}"


def lease_of(protocol: bytes) -> str | None:
    """Return the lease that the application protocol names; None if it names none."""
    prefix = _PREFIX.encode()
    name = protocol[len(prefix) :]
    known = protocol.startswith(prefix) and 0 < len(name) <= _MAX_ID_LENGTH
    return name.decode("ascii") if known and name.replace(b"-", b"").isalnum() else None


def client_context(ca: str) -> ssl.SSLContext:
    """Return a context that trusts only ``ca`` (PEM text; empty: the CAs of this system). Raises ssl.SSLError."""
    context = ssl.create_default_context(cadata=ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def server_context(certfile: str, keyfile: str) -> ssl.SSLContext:
    """Return a context with that certificate and key. Raises OSError, also ssl.SSLError, for unusable files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no client resumes, and tickets would wake a client that waits for a frame
    context.load_cert_chain(certfile, keyfile)
    return context


class ServerCertificate:
    """A worker's certificate: as it is on disk, or where the files are out of its reach, as it was last given.

    Reads the files at once, and again for each connection.
    """

    def __init__(self, certfile: str, keyfile: str) -> None:
        self._files = certfile, keyfile
        self._latest: ssl.SSLContext | None = None
        with contextlib.suppress(OSError):  # they may be there when somebody connects
            self.context()

    def context(self) -> ssl.SSLContext:
        """Return a context with it. Raises OSError, also ssl.SSLError, if there never was a usable one."""
        try:
            self._latest = server_context(*self._files)
        except OSError:
            if self._latest is None:
                raise
        return self._latest

    def renew(self, certfile: str, keyfile: str) -> None:
        """Use the certificate in these files from now on. Raises OSError, also ssl.SSLError, for unusable files."""
        self._latest = server_context(certfile, keyfile)


class SecureSocket:
    """A TLS connection with as much of a socket's interface as the data plane uses.

    OpenSSL allows one call at a time for a connection, and Python before 3.13 does not ensure that. So every call is
    made under a lock, and none blocks while it holds the lock.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str | None = None
    ) -> None:
        self._timeout = sock.gettimeout()
        self._lock = threading.Lock()
        self._ssl = context.wrap_socket(
            sock,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
            do_handshake_on_connect=False,
        )
        # Only one thread reads at a time, so this poll object can be shared; writers create their own.
        self._readable = new_poll()

    def handshake(self) -> None:
        """Run the whole TLS handshake within the timeout. Raises OSError."""
        self._ssl.settimeout(self._timeout)
        self._ssl.do_handshake()
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
