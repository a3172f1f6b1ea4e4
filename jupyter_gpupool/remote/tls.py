"""TLS 1.3 on the data plane: a connection that two threads use at once, as they may use a plain socket.

The lease stands in the client's first message (as an application protocol, RFC 7301), so that whoever listens
on the one port of a GPU server knows whose worker to hand the connection to. Only the worker speaks TLS.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Any

#: Before the lease's id in the application protocol's name.
_PREFIX = "gpupool-lease/"
#: What TLS has no name for is cut off here: no lease's id is longer.
_LONGEST = 64


def protocol_of(lease_id: str) -> str:
    """The application protocol by which a client asks for that lease's worker."""
    return f"{_PREFIX}{lease_id}"


def lease_of(protocol: bytes) -> str | None:
    """The lease that an application protocol asks for, if it does."""
    prefix = _PREFIX.encode()
    name = protocol[len(prefix) :]
    known = protocol.startswith(prefix) and 0 < len(name) <= _LONGEST
    return name.decode("ascii") if known and name.replace(b"-", b"").isalnum() else None


def client_context(ca: str) -> ssl.SSLContext:
    """Trusts that CA alone (PEM text; empty: those that this system trusts). Raises ssl.SSLError."""
    context = ssl.create_default_context(cadata=ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def server_context(certfile: str, keyfile: str) -> ssl.SSLContext:
    """Raises OSError (ssl.SSLError among them) for files that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = (
        0  # nobody resumes, and a client that waits for a frame is not to be woken by tickets
    )
    context.load_cert_chain(certfile, keyfile)
    return context


class SecureSocket:
    """A TLS connection with as much of a socket's interface as the data plane uses.

    OpenSSL allows one call at a time for a connection, and none of Python's versions before 3.13 sees to that:
    so every call is made under a lock, and none waits there.
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
        # One thread reads at a time; any may wait to write.
        self._readable = select.poll()

    def handshake(self) -> None:
        """Within the timeout, all of it. Raises OSError."""
        self._ssl.settimeout(self._timeout)
        self._ssl.do_handshake()
        self._ssl.setblocking(False)
        self._readable.register(self._ssl, select.POLLIN)

    # -- as a socket has it

    def fileno(self) -> int:
        return self._ssl.fileno()

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._ssl.setsockopt(level, option, value)

    def recv_into(self, view: memoryview) -> int:
        deadline = self._deadline()
        while True:
            # What is asked for in vain costs an exception, so the system is asked before OpenSSL is.
            if not self.pending():
                self._wait(self._readable, deadline)
            try:
                with self._lock:
                    return self._ssl.read(len(view), view)  # type: ignore[return-value]  # with a buffer, a count
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLWantWriteError:
                self._wait(self._to_write(), deadline)
            except ssl.SSLZeroReturnError:
                return 0
            except ValueError:
                raise _closed() from None

    def sendall(self, data: Any) -> None:
        deadline = self._deadline()
        rest = memoryview(data)
        while len(rest):
            try:
                with self._lock:
                    n = self._ssl.send(rest)
                rest = rest[n:]
            except ssl.SSLWantWriteError:
                self._wait(self._to_write(), deadline)
            except ssl.SSLWantReadError:  # never with TLS 1.3, whose peers do not renegotiate
                continue
            except ValueError:
                raise _closed() from None

    def shutdown(self, how: int) -> None:
        # Not SSLSocket's own, after which it would speak in plain text.
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

    # -- beyond that

    def pending(self) -> bool:
        """Whether there is something to read that has left the system's buffers already."""
        with self._lock:
            try:
                return self._ssl.pending() > 0
            except (OSError, ValueError):
                return False

    def _to_write(self) -> select.poll:
        poll = select.poll()
        if self.fileno() >= 0:
            poll.register(self._ssl, select.POLLOUT)
        return poll

    def _deadline(self) -> float | None:
        return None if self._timeout is None else time.monotonic() + self._timeout

    def _wait(self, until: select.poll, deadline: float | None) -> None:
        if self.fileno() < 0:
            raise _closed()
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not until.poll(left):
            raise TimeoutError("timed out")


def _closed() -> OSError:
    return OSError(errno.EBADF, "the connection was closed")


Connection = socket.socket | SecureSocket


def readable(sock: Connection, poll: select.poll, timeout_ms: float) -> bool:
    """Whether there is something to read, at the latest after so long; the socket is registered with ``poll``."""
    return (type(sock) is SecureSocket and sock.pending()) or bool(poll.poll(timeout_ms))
