"""The holder's connection to its worker: while it stands, the lease has somebody who wants it."""

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

    The worker ends when this connection breaks, so that a killed holder frees its share at once.
    ``on_lost`` is called once, from the pinging thread, with one line for people when it is the
    worker that went away. Raises what :func:`~.handshake.connect` raises.
    """

    def __init__(self, spec: AttachSpec, on_lost: Callable[[str], None] | None = None) -> None:
        self.spec = spec
        self._on_lost = on_lost
        self._sock, _ = handshake.connect(spec, "holder", {})
        self._wake, self._waker = socket.socketpair()
        self._released = threading.Event()
        self._lost = ""
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._forked)
        self._thread = threading.Thread(target=self._run, name="gpupool-lifeline", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._released.is_set() and not self._lost

    @property
    def lost(self) -> str:
        """Why the worker went away; empty while it has not."""
        return self._lost

    def release(self) -> None:
        """Say goodbye; the worker ends. Harmless when it is gone already, or called twice."""
        if self._released.is_set() or os.getpid() != self._pid:
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
                        self._lose(str(header.get("message", "the worker ended")))
                        return
                elif not self._released.is_set():
                    wire.send(self._sock, wire.Kind.PING, None)
            wire.send(self._sock, wire.Kind.BYE, None)
        except (ConnectionError, wire.WireError):
            if not self._released.is_set():
                self._lose("the worker went away without a word")
        finally:
            self._sock.close()
            self._wake.close()
            self._waker.close()

    def _lose(self, reason: str) -> None:
        self._lost = reason
        if self._on_lost is not None:
            self._on_lost(reason)

    def _forked(self) -> None:
        # A child must not keep the connection open on its parent's behalf.
        for sock in (self._sock, self._wake, self._waker):
            if sock.fileno() >= 0:
                os.close(sock.detach())
        self._released.set()
