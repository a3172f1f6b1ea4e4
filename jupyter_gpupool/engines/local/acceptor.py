"""The data port of a GPU server: a process that hands each connection, unread, to its lease's worker.

Started by :class:`~.data_port.DataPort` as ``python -m jupyter_gpupool.engines.local.acceptor LISTENER CONTROL FOLDER
POOL [--persistent]``: the descriptors of the listening socket and of a socket of the pool, the folder of the workers'
sockets, and the pool's process id.

It peeks at the first TLS message, which names the lease in the clear, and passes the connection on by SCM_RIGHTS.
The worker authenticates the client inside TLS. So this port adds no cost to an operator, and this process can outlive
a pool: it gives the listening socket to a process that connects to ``FOLDER/acceptor``.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jupyter_gpupool.core import processes
from jupyter_gpupool.core.addresses import network
from jupyter_gpupool.transport.client_hello import MOST, NotTLS, wanted_lease

from .worker_files import DOOR

#: The socket at which an acceptor hands its listening socket to the next one, in the folder of the workers' sockets.
SUCCESSION = "acceptor"

#: How long a client may take to send the first message, in seconds.
_FIRST_MESSAGE_TIMEOUT_S = 5.0
#: How many clients may be about to send it, in all and from one address; the oldest make room.
_MAX_PENDING = 4096
_MAX_PENDING_OF_ADDRESS = 256
#: How long to wait for a worker that has not taken its last connections yet, in seconds: the kernel queues few.
_RETRY_INTERVAL_S = 0.02
#: How often an acceptor without a pool checks whether any worker is left, in seconds.
_ORPHAN_CHECK_INTERVAL_S = 2.0

#: A fatal TLS alert: "no application protocol": there is no such lease here.
_NO_SUCH_LEASE = bytes((21, 3, 3, 0, 2, 2, 120))


@dataclass(eq=False)
class _PendingConnection:
    sock: socket.socket
    address: str
    until: float
    lease: str = ""


class Acceptor:
    """``control``: a socket that is closed when the pool ends; None once there is no pool."""

    def __init__(
        self, listener: socket.socket, control: socket.socket, folder: str, persistent: bool
    ) -> None:
        self._listener: socket.socket | None = listener
        self._control: socket.socket | None = control
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._persistent = persistent
        self._pending: dict[int, _PendingConnection] = {}  # by descriptor, in order of arrival
        self._of_address: Counter[str] = Counter()
        self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._out.setblocking(False)
        listener.setblocking(False)
        self._succession = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(FileNotFoundError):
            os.unlink(self._path(SUCCESSION))
        self._succession.bind(self._path(SUCCESSION))
        self._succession.listen(4)
        self._epoll = select.epoll()
        for sock in (listener, control, self._succession):
            self._epoll.register(sock, select.EPOLLIN)
        self._look_at = 0.0
        self._busy = False

    def run(self) -> None:
        """Serve until the pool is gone (persistent: until its workers are, too) or another acceptor takes over."""
        while self._listener is not None or self._pending:
            for descriptor, _ in self._epoll.poll(self._until_next()):
                if descriptor in self._pending:
                    self._look(self._pending[descriptor])
                elif self._listener is not None and descriptor == self._listener.fileno():
                    self._accept(self._listener)
                elif self._control is not None and descriptor == self._control.fileno():
                    self._orphaned(self._control)
                elif descriptor == self._succession.fileno():
                    self._hand_over()
            self._busy = False
            for connection in [s for s in self._pending.values() if s.lease]:
                self._hand_to_worker(connection)
            self._turn_away_the_late()
            if self._control is None and self._listener is not None and time.monotonic() > self._look_at:
                self._look_at = time.monotonic() + _ORPHAN_CHECK_INTERVAL_S
                if not self._persistent or not self._any_worker():
                    self._close(self._listener)
                    self._listener = None

    def _path(self, name: str) -> str:
        # A Unix socket's path may have 107 bytes; this one is short wherever the folder is.
        return f"/proc/self/fd/{self._folder}/{name}"

    def _until_next(self) -> float | None:
        first = next(iter(self._pending.values()), None)
        waits = [] if first is None else [max(0.0, first.until - time.monotonic()) + 0.01]
        if self._control is None:
            waits.append(_ORPHAN_CHECK_INTERVAL_S)
        if self._busy:
            waits.append(_RETRY_INTERVAL_S)
        return min(waits, default=None)

    # -- unauthenticated connections

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(128):
            try:
                sock, address = listener.accept()
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE) and self._pending:
                    self._dismiss(next(iter(self._pending.values())))
                    continue
                return  # no connection waits any more
            sock.setblocking(False)
            connection = _PendingConnection(
                sock, network(str(address[0])), time.monotonic() + _FIRST_MESSAGE_TIMEOUT_S
            )
            self._pending[sock.fileno()] = connection
            self._of_address[connection.address] += 1
            if self._of_address[connection.address] > _MAX_PENDING_OF_ADDRESS:
                self._dismiss(next(s for s in self._pending.values() if s.address == connection.address))
            elif len(self._pending) > _MAX_PENDING:
                self._dismiss(next(iter(self._pending.values())))
            # Edge-triggered: a first message in pieces must not keep this loop turning.
            self._epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def _look(self, connection: _PendingConnection) -> None:
        try:
            data = connection.sock.recv(MOST, socket.MSG_PEEK)
            lease = wanted_lease(data) if data else ""
        except BlockingIOError:
            return
        except (OSError, NotTLS):
            self._dismiss(connection)
            return
        if lease:
            connection.lease = lease
        elif lease == "":
            self._dismiss(connection, _NO_SUCH_LEASE)

    def _hand_to_worker(self, connection: _PendingConnection) -> None:
        rights = array.array("i", [connection.sock.fileno()])
        try:
            self._out.sendmsg(
                [b"."],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
                0,
                self._path(connection.lease + DOOR),
            )
        except BlockingIOError:
            self._busy = True
        except OSError:  # there is no such worker, or it is dead
            self._dismiss(connection, _NO_SUCH_LEASE)
        else:
            self._dismiss(connection)

    def _dismiss(self, connection: _PendingConnection, alert: bytes = b"") -> None:
        del self._pending[connection.sock.fileno()]
        self._of_address[connection.address] -= 1
        if not self._of_address[connection.address]:
            del self._of_address[connection.address]
        if alert:
            with suppress(OSError):
                connection.sock.recv(MOST)  # unread bytes would turn the alert into a reset
                connection.sock.send(alert)
        connection.sock.close()

    def _turn_away_the_late(self) -> None:
        now = time.monotonic()
        while self._pending:
            first = next(iter(self._pending.values()))
            if first.until > now:
                return
            self._dismiss(first)

    # -- the pool, and the next acceptor

    def _orphaned(self, control: socket.socket) -> None:
        self._close(control)
        self._control = None
        self._look_at = 0.0

    def _hand_over(self) -> None:
        successor, _ = self._succession.accept()
        with successor:
            if self._listener is None:
                return
            try:
                socket.send_fds(successor, [b"listener"], [self._listener.fileno()])
            except OSError:
                return  # it has gone again
        self._close(self._listener)
        self._listener = None

    def _any_worker(self) -> bool:
        return any(self._answers(door.name) for door in Path(self._path("")).glob(f"*{DOOR}"))

    def _answers(self, name: str) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._path(name))
            except OSError:
                return False
        return True

    def _close(self, sock: socket.socket) -> None:
        self._epoll.unregister(sock)
        sock.close()


def main() -> None:
    """Run the acceptor until the pool is gone."""
    persistent = "--persistent" in sys.argv[5:]
    if not persistent and not processes.die_with_parent(int(sys.argv[4])):
        return
    listener, control = (socket.socket(fileno=int(text)) for text in sys.argv[1:3])
    Acceptor(listener, control, sys.argv[3], persistent).run()


if __name__ == "__main__":
    main()
