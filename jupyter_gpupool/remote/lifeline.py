"""The holder's connections to its workers: while they stand, the lease has somebody who wants it."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable

from . import handshake, tls, wire
from .specs import AttachSpec


class Lifeline:
    """Holds a lease from this process until :meth:`release`, or until the process ends.

    A worker ends when its connection breaks, so that a killed holder frees its share at once.
    ``on_lost`` is called once, from a pinging thread, with one line for people when it is a
    worker that went away. Those on other servers are the pool's to end then: who let them go would have
    released the lease, and it is lost.
    Raises what :func:`~.handshake.connect` raises.
    """

    def __init__(self, spec: AttachSpec, on_lost: Callable[[str], None] | None = None) -> None:
        self.spec = spec
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._released = False
        self._lost = ""
        self._lines: list[_Line] = []
        try:
            for part in spec.parts():
                self._lines.append(_Line(part, self._lose))
        except BaseException:
            self.release()
            raise

    @property
    def alive(self) -> bool:
        return os.getpid() == self._pid and not self._released and not self._lost

    @property
    def lost(self) -> str:
        """Why a worker went away; empty while none has."""
        return self._lost

    def release(self) -> None:
        """Say goodbye; the workers end. Harmless when they are gone already, or called twice."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._released = True
        for line in self._lines:
            line.release()

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._released or self._lost:
                return
            self._lost = reason
        if self._on_lost is not None:
            self._on_lost(reason)


class _Line:
    """The connection to one worker; ``on_lost`` as above."""

    def __init__(self, spec: AttachSpec, on_lost: Callable[[str], None]) -> None:
        self.spec = spec
        self._on_lost = on_lost
        self._sock, _ = handshake.connect(spec, "holder", {})
        self._wake, self._waker = socket.socketpair()
        self._released = threading.Event()
        os.register_at_fork(after_in_child=self._forked)
        self._thread = threading.Thread(target=self._run, name="gpupool-lifeline", daemon=True)
        self._thread.start()

    def release(self) -> None:
        if self._released.is_set():
            return
        self._released.set()
        try:
            self._waker.send(b"x")
        except OSError:
            pass  # the thread has ended, for the worker has
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        interval = max(0.2, self.spec.ttl_s / 4)
        # Not select(): a Jupyter server with many kernels has more files open than that can name.
        ready = select.poll()
        ready.register(self._sock, select.POLLIN)
        ready.register(self._wake, select.POLLIN)
        try:
            while not self._released.is_set():
                if tls.readable(self._sock, ready, interval * 1000) and not self._released.is_set():
                    kind, header, _ = wire.receive(self._sock)
                    if kind is wire.Kind.BYE:
                        self._on_lost(str(header.get("message", "the worker ended")))
                        return
                elif not self._released.is_set():
                    wire.send(self._sock, wire.Kind.PING, None)
            wire.send(self._sock, wire.Kind.BYE, None)
        except (ConnectionError, wire.WireError):
            if not self._released.is_set():
                self._on_lost("the worker went away without a word")
        finally:
            self._sock.close()
            self._wake.close()
            self._waker.close()

    def _forked(self) -> None:
        # A child must not keep the connection open on its parent's behalf.
        for sock in (self._sock, self._wake, self._waker):
            if sock.fileno() >= 0:
                os.close(sock.detach())
        self._released.set()
