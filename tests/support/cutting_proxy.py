"""A proxy between a client and its worker that loses connections at random points of the stream."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from typing import Any

#: How a connection is lost: reset at both ends, one end told in order that the other has closed, or nothing arrives.
RESET, CLOSED, SILENT = "reset", "closed", "silent"
_PIECE = 4096


class CuttingProxy:
    """Forwards connections to ``target``, and loses ``cuts`` of them, each after some thousand bytes.

    A context manager. ``ways``: how, one of them at random. ``seed`` makes the points the same in each run, as far as
    the stream is.
    """

    def __init__(
        self,
        target: tuple[str, int],
        cuts: int = 0,
        ways: tuple[str, ...] = (RESET,),
        seed: int = 0,
        mean_bytes: int = 20_000,
    ) -> None:
        self._target = target
        self._chance = random.Random(seed)
        self._ways = ways
        self._mean_bytes = mean_bytes
        self._lock = threading.Lock()
        self._socks: set[socket.socket] = set()
        #: whether connections are reset as soon as they are made, and how many were
        self.refuses = False
        self.refused = 0
        self.bytes = 0
        #: how many connections are still to be lost
        self.cuts_left = cuts
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *error: Any) -> None:
        self._listener.close()
        self.cut_all()

    def cut_all(self) -> None:
        """Reset every connection now."""
        with self._lock:
            socks = list(self._socks)
            self._socks.clear()
        for sock in socks:
            _reset(sock)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                self.refused += 1
                _reset(near)
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:  # as the machine itself would answer: nobody listens here
                self._listener.close()
                _reset(near)
                return
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._socks |= {near, far}
                self.connections += 1
                # Not inside a handshake alone: that one more often, or nothing would ever get through.
                budget = [int(self._chance.expovariate(1 / self._mean_bytes)) + 100]
                way = self._chance.choice(self._ways)
                if way == SILENT:
                    budget[0] += 8000  # a handshake that hangs takes ten seconds
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink, budget, way), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, budget: list[int], way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE):
                with self._lock:
                    self.bytes += len(data)
                    is_cut = self.cuts_left > 0 and budget[0] < len(data)
                    piece = data[: max(0, budget[0])] if is_cut else data
                    budget[0] -= len(data)
                    if is_cut and budget[0] > -(1 << 60):
                        self.cuts_left -= 1
                        budget[0] = -(1 << 62)  # once for both directions
                if piece:
                    sink.sendall(piece)
                if is_cut:
                    self._lose(source, sink, way)
                    return
        with self._lock:
            if source not in self._socks:
                return  # it was reset
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _lose(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        if way == RESET:
            with self._lock:
                self._socks -= {source, sink}
            _reset(source)
            _reset(sink)
        elif way == CLOSED:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
        # SILENT: this direction is read no more, and both ends are left in the belief that all is well.


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Another thread reads from it, so closing alone would not send anything.
        sock.shutdown(socket.SHUT_RD)
        sock.close()
