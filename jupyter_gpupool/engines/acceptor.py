"""The one data port of a GPU server: a process that hands each connection to its lease's worker, unread.

Started by :class:`~.data_port.DataPort` as ``python -m jupyter_gpupool.engines.acceptor LISTENER CONTROL FOLDER
POOL [--persistent]``: the descriptors of the listening socket and of a socket of the pool's, where the workers'
doors are, and the pool's process.

It looks at the first TLS message without taking it, which names the lease in the open, and passes the connection
on by SCM_RIGHTS. Who that is, the worker finds out inside TLS. So an operator costs what it costs without this
port, and this process outlives any pool: whoever connects to ``FOLDER/acceptor`` is given the listening socket.
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

from ..remote.client_hello import MOST, NotTLS, wanted_lease
from . import process
from .addresses import network
from .records import DOOR

#: Where an acceptor hands its listening socket to the next one, in the folder of the workers' doors.
SUCCESSION = "acceptor"

#: How long somebody may take for the first message, in seconds.
_PATIENCE_S = 5.0
#: How many may be about to send it, in all and from one address; the oldest make room.
_MOST = 4096
_MOST_OF_ADDRESS = 256
#: How long to wait for a worker that has not taken its last connections yet, in seconds: the system keeps few.
_AGAIN_S = 0.02
#: How often an acceptor without a pool looks whether any worker is left, in seconds.
_LOOK_S = 2.0

#: A fatal TLS alert: "no application protocol", for nobody here knows that lease.
_NO_SUCH_LEASE = bytes((21, 3, 3, 0, 2, 2, 120))


@dataclass(eq=False)
class _Stranger:
    sock: socket.socket
    address: str
    until: float
    lease: str = ""


class Acceptor:
    """``control``: ends when the pool does; None where there is none any more."""

    def __init__(
        self, listener: socket.socket, control: socket.socket, folder: str, persistent: bool
    ) -> None:
        self._listener: socket.socket | None = listener
        self._control: socket.socket | None = control
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._persistent = persistent
        self._strangers: dict[int, _Stranger] = {}  # by descriptor, in order of arrival
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
        """Until the pool is gone (a persistent one: and its workers are) or another acceptor takes over."""
        while self._listener is not None or self._strangers:
            for descriptor, _ in self._epoll.poll(self._until_next()):
                if descriptor in self._strangers:
                    self._look(self._strangers[descriptor])
                elif self._listener is not None and descriptor == self._listener.fileno():
                    self._accept(self._listener)
                elif self._control is not None and descriptor == self._control.fileno():
                    self._orphaned(self._control)
                elif descriptor == self._succession.fileno():
                    self._hand_over()
            self._busy = False
            for stranger in [s for s in self._strangers.values() if s.lease]:
                self._hand_to_worker(stranger)
            self._turn_away_the_late()
            if self._control is None and self._listener is not None and time.monotonic() > self._look_at:
                self._look_at = time.monotonic() + _LOOK_S
                if not self._persistent or not self._any_worker():
                    self._close(self._listener)
                    self._listener = None

    def _path(self, name: str) -> str:
        # A Unix socket's path may have 107 bytes; this one is short wherever the folder is.
        return f"/proc/self/fd/{self._folder}/{name}"

    def _until_next(self) -> float | None:
        first = next(iter(self._strangers.values()), None)
        waits = [] if first is None else [max(0.0, first.until - time.monotonic()) + 0.01]
        if self._control is None:
            waits.append(_LOOK_S)
        if self._busy:
            waits.append(_AGAIN_S)
        return min(waits, default=None)

    # -- strangers

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(128):
            try:
                sock, address = listener.accept()
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE) and self._strangers:
                    self._dismiss(next(iter(self._strangers.values())))
                    continue
                return  # nobody waits any more, or whoever did has left
            sock.setblocking(False)
            stranger = _Stranger(sock, network(str(address[0])), time.monotonic() + _PATIENCE_S)
            self._strangers[sock.fileno()] = stranger
            self._of_address[stranger.address] += 1
            if self._of_address[stranger.address] > _MOST_OF_ADDRESS:
                self._dismiss(next(s for s in self._strangers.values() if s.address == stranger.address))
            elif len(self._strangers) > _MOST:
                self._dismiss(next(iter(self._strangers.values())))
            # Edge-triggered: a first message in pieces must not keep this loop turning.
            self._epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def _look(self, stranger: _Stranger) -> None:
        try:
            data = stranger.sock.recv(MOST, socket.MSG_PEEK)
            lease = wanted_lease(data) if data else ""
        except BlockingIOError:
            return
        except (OSError, NotTLS):
            self._dismiss(stranger)
            return
        if lease:
            stranger.lease = lease
        elif lease == "":
            self._dismiss(stranger, _NO_SUCH_LEASE)

    def _hand_to_worker(self, stranger: _Stranger) -> None:
        rights = array.array("i", [stranger.sock.fileno()])
        try:
            self._out.sendmsg(
                [b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], 0, self._path(stranger.lease + DOOR)
            )
        except BlockingIOError:
            self._busy = True
        except OSError:  # there is no such worker, or it is dead
            self._dismiss(stranger, _NO_SUCH_LEASE)
        else:
            self._dismiss(stranger)

    def _dismiss(self, stranger: _Stranger, last_word: bytes = b"") -> None:
        del self._strangers[stranger.sock.fileno()]
        self._of_address[stranger.address] -= 1
        if not self._of_address[stranger.address]:
            del self._of_address[stranger.address]
        if last_word:
            with suppress(OSError):
                stranger.sock.recv(MOST)  # what is unread would turn the farewell into a reset
                stranger.sock.send(last_word)
        stranger.sock.close()

    def _turn_away_the_late(self) -> None:
        now = time.monotonic()
        while self._strangers:
            first = next(iter(self._strangers.values()))
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
    persistent = "--persistent" in sys.argv[5:]
    if not persistent and not process.die_with_parent(int(sys.argv[4])):
        return
    listener, control = (socket.socket(fileno=int(text)) for text in sys.argv[1:3])
    Acceptor(listener, control, sys.argv[3], persistent).run()


if __name__ == "__main__":
    main()
