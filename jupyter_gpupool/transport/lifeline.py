"""The holder's connections to its workers: a lease is held as long as they are open."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import frames, handshake, tls
from .polling import READABLE, new_poll
from .specs import AttachSpec

#: How many pings may go without an answer before the connection is given up; one is sent each quarter of the TTL.
_MAX_UNANSWERED = 4
#: How long an attempt to connect again may take, in seconds.
_ATTEMPT_TIMEOUT_S = 5.0
#: A GPU server that says for so long that it has no such worker is believed, in seconds. A worker that ended by what it
#: computed may be replaced meanwhile; one that could say so is waited for longer.
_NO_WORKER_S = 3.0
_REPLACED_WITHIN_S = 10.0


class _Lost(Exception):
    """The worker has ended, or is out of reach for too long; the message is the reason."""


class Lifeline:
    """Holds a lease from this process until :meth:`release`, or until the process ends.

    A worker ends soon after its holder's system has closed the connection, so a killed holder frees its slices. A
    connection that breaks is made again, for as long as the worker waits for it.
    ``on_lost`` is called once, from a pinging thread, with one line for people, if a worker goes away. The connections
    to the lease's other workers then stay open, because closing them would release the lease, which is lost; the pool
    ends those workers. ``lives`` answers a worker that asks whether a process of the lease lives: None if this is
    another machine. ``locate`` returns the spec of the lease as the pool knows it, or None: it is asked where no worker
    answers any more, for the lease may have moved. Where it goes on, the connections go, too.
    Raises what :func:`~.handshake.connect` raises.
    """

    def __init__(
        self,
        spec: AttachSpec,
        on_lost: Callable[[str], None] | None = None,
        lives: Callable[[Any], bool | None] = lambda process: None,
        locate: Callable[[], AttachSpec | None] = lambda: None,
    ) -> None:
        self.spec = spec
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._released = False
        self._lost = ""
        self._lines: list[_Line] = []
        try:
            for part in spec.parts():
                self._lines.append(_Line(part, self._lose, lives, locate))
        except BaseException:
            self.release()
            raise

    @property
    def alive(self) -> bool:
        """Whether this process holds the lease and all workers run."""
        return os.getpid() == self._pid and not self._released and not self._lost

    @property
    def lost(self) -> str:
        """Why a worker went away; empty while none has."""
        return self._lost

    def release(self, died: bool = False) -> None:
        """Close the connections on purpose, so that the workers end. Harmless when called again.

        ``died``: the program that this process keeps the lease for has died.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._released = True
        for line in self._lines:
            line.release(died)

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._released or self._lost:
                return
            self._lost = reason
        if self._on_lost is not None:
            self._on_lost(reason)


class _Line:
    """The connection to one worker; ``on_lost``, ``lives`` and ``locate`` as in Lifeline."""

    def __init__(
        self,
        spec: AttachSpec,
        on_lost: Callable[[str], None],
        lives: Callable[[Any], bool | None],
        locate: Callable[[], AttachSpec | None],
    ) -> None:
        self.spec = spec
        self._locate = locate
        self._on_lost = on_lost
        self._lives = lives
        self._died = False
        self._id = secrets.token_hex(16)
        self._sock, welcome = handshake.connect_first(
            lambda: handshake.connect(spec, "holder", {"holder": self._id})
        )
        self._resume_s = float(welcome.get("resume_s", 0.0))
        #: why the worker has ended, if another one is to take its place
        self._replaced = ""
        self._wake, self._waker = socket.socketpair()
        self._released = threading.Event()
        if hasattr(os, "register_at_fork"):  # a system without it has no fork either
            os.register_at_fork(after_in_child=self._forked)
        self._thread = threading.Thread(target=self._run, name="gpupool-lifeline", daemon=True)
        self._thread.start()

    def release(self, died: bool) -> None:
        if self._released.is_set():
            return
        self._died = died
        self._released.set()
        try:
            self._waker.send(b"x")
        except OSError:
            pass  # the thread has ended, because the worker has
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._released.is_set():
                try:
                    self._hold()
                except (OSError, frames.WireError):
                    self._restore()
            with contextlib.suppress(OSError):  # also where the release came while it connected again
                frames.send(self._sock, frames.Kind.BYE, {"died": self._died})
        except _Lost as e:
            if not self._released.is_set():
                self._on_lost(str(e))
        finally:
            self._sock.close()
            self._wake.close()
            self._waker.close()

    def _hold(self) -> None:
        """Ping and listen until the lease is released. Raises OSError, WireError and _Lost."""
        interval = max(0.2, self.spec.ttl_s / 4)
        self._sock.settimeout(self.spec.ttl_s)
        # Not select(): a Jupyter server with many kernels has more open files than it can handle.
        ready = new_poll()
        ready.register(self._sock, READABLE)
        ready.register(self._wake, READABLE)
        unanswered = 0
        while not self._released.is_set():
            if tls.readable(self._sock, ready, interval * 1000):
                if self._released.is_set():
                    break
                kind, header, _ = frames.receive(self._sock)
                unanswered = 0
                if kind is frames.Kind.BYE:
                    where = handshake.moved_to(header)
                    if where is not None:
                        self._follow(where)
                        raise where
                    said = header if isinstance(header, dict) else {}
                    message = str(said.get("message") or "the worker ended")
                    if said.get("replaced") is True:
                        self._replaced = message
                        raise frames.ConnectionLost(message)
                    raise _Lost(message)
                if kind is frames.Kind.PROBE:
                    frames.send(self._sock, kind, {"process": header, "lives": self._lives(header)})
            elif not self._released.is_set():
                if unanswered >= _MAX_UNANSWERED:
                    raise frames.ConnectionLost("the worker does not answer")
                unanswered += 1
                frames.send(self._sock, frames.Kind.PING, None)

    def _restore(self) -> None:
        """Connect again. Raises _Lost where the worker is gone, or for too long out of reach."""
        self._sock.close()
        began = refused_at = time.monotonic()
        why, self._replaced = self._replaced, ""
        patience_s = _REPLACED_WITHIN_S if why else min(_NO_WORKER_S, self._resume_s)
        pause_s = 0.0
        while not self._released.wait(pause_s):
            pause_s = min(1.0, max(0.02, 2 * pause_s))
            try:
                self._sock, _ = handshake.connect(
                    self.spec, "holder", {"holder": self._id}, _ATTEMPT_TIMEOUT_S
                )
                return
            except handshake.Refused as e:
                raise _Lost(str(e)) from None
            except handshake.MovedAway as e:
                self._follow(e)
                continue
            except (frames.NoWorker, frames.Unreachable) as e:
                if self._follow_pool():
                    continue
                if isinstance(e, frames.Unreachable):
                    refused_at = time.monotonic()
            except (OSError, frames.WireError):
                refused_at = time.monotonic()
            now = time.monotonic()
            if now - refused_at >= patience_s:
                raise _Lost(why or "the worker went away without a word")
            if now - began >= self._resume_s:
                raise _Lost(f"no connection to it for {self._resume_s:g} s")

    def _follow(self, where: handshake.MovedAway) -> None:
        self.spec = replace(self.spec, host=where.host, port=where.port)

    def _follow_pool(self) -> bool:
        """Ask the pool where the lease is. Whether it is elsewhere."""
        found = self._locate()
        part = None if found is None else found.part_of(self.spec.devices[0].index)
        if part is None or (part.host, part.port) == (self.spec.host, self.spec.port):
            return False
        self.spec = replace(self.spec, host=part.host, port=part.port)
        return True

    def _forked(self) -> None:
        # A forked child must not keep its parent's connection open.
        for sock in (self._sock, self._wake, self._waker):
            if sock.fileno() >= 0:
                os.close(sock.detach())
        self._released.set()
