"""The process on a GPU server that executes one lease's operators, for as long as somebody holds it."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from . import handshake, tls, wire
from .executor import Session
from .heap import keep_freed_memory
from .incoming import Frame, Incoming
from .program import BadRecord
from .slices import Device
from .specs import EXIT_FENCED, EXIT_HOLDER_LOST, EXIT_NEVER_ATTACHED, EXIT_RELEASED, EXIT_STOPPED, WorkerSpec

#: How often a worker looks at the clock, in seconds.
_BEAT = 0.25
#: How long somebody may take to show the lease's secret, in seconds, and how many may be about to at once.
_PATIENCE_S = 10.0
_MOST_STRANGERS = 64
#: How many processes may use the lease at once.
_MOST_SESSIONS = 256


#: Has the worker keep to so many MiB by GPU uuid; answers what is in use where that is more (then nothing changes).
Limit = Callable[[Mapping[str, int]], dict[str, int]]


def serve(
    spec: WorkerSpec,
    listener: socket.socket,
    report: Callable[[dict[str, Any]], None],
    look: Callable[[Limit], None] = lambda limit: None,
) -> int:
    """Serve one lease until it ends; returns one of the EXIT_* codes. ``listener`` listens on TCP, or is a
    datagram socket of the Unix domain to which accepted connections are sent (SCM_RIGHTS).

    ``report`` is told about once a second, when it has changed, what the lease uses:
    ``{"allocated_bytes": {uuid: bytes}, "busy": {uuid: 0 to 1}, "sessions": n, "held_at": when, or None}``.
    ``look`` is called a few times a second with what resizes the lease, should its pool want that.
    A thread may still be inside an operator then: leave the process by ``os._exit``.
    """
    if any(d.emulated for d in spec.devices):
        keep_freed_memory()
    return Worker(spec, report, look).run(listener)


class Worker:
    """Admits connections, and decides when the lease is over."""

    def __init__(
        self,
        spec: WorkerSpec,
        report: Callable[[dict[str, Any]], None],
        look: Callable[[Limit], None] = lambda limit: None,
    ) -> None:
        self.spec = spec
        self._report = report
        self._look = look
        self._devices: list[Device] | None = None
        self._lock = threading.Lock()
        self._over = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._code = EXIT_RELEASED
        self._strangers: dict[socket.socket, float] = {}
        self._holders: dict[tls.Connection, float] = {}
        self._held_at: float | None = None
        self._sessions: set[tls.Connection] = set()
        self._reported: dict[str, Any] = {}
        self._busy_before: dict[str, float] = {}

    def run(self, listener: socket.socket) -> int:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self.end(EXIT_STOPPED))
        threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True).start()
        born = beat = time.monotonic()
        while not self._over:
            select.select([self._wake], [], [], _BEAT)
            now = time.monotonic()
            with self._lock:
                holders = dict(self._holders)
            if self._held_at is None:
                if now - born > self.spec.attach_timeout_s:
                    self.end(EXIT_NEVER_ATTACHED)
            elif holders and now - max(holders.values()) > self.spec.ttl_s:
                self.end(EXIT_FENCED)
            self._turn_away(now - _PATIENCE_S)
            self._look(self.limit)
            if now - beat >= 1.0:
                self._tell(now - beat)
                beat = now
        self._say_goodbye()
        return self._code

    def end(self, code: int) -> None:
        """Takes no lock: a signal's handler calls this while the main thread may hold any."""
        if not self._over:
            self._code = code
            self._over = True
            os.eventfd_write(self._wake, 1)

    def devices(self) -> list[Device]:
        """The slices; made when the first session comes, so that CUDA is not touched before."""
        with self._lock:
            if self._devices is None:
                self._devices = [Device(d, n) for n, d in enumerate(self.spec.devices)]
                for d in self._devices:
                    d.cap()
            return self._devices

    def limit(self, limits: Mapping[str, int]) -> dict[str, int]:
        """Keep to so many MiB by GPU uuid from now on; with more in use somewhere, change nothing and say how
        many MiB, by GPU."""
        with self._lock, contextlib.ExitStack() as locked:
            devices = self._devices or []
            for d in devices:
                locked.enter_context(d.lock)
            in_use = {
                d.spec.uuid: -(-d.allocated >> 20)
                for d in devices
                if d.allocated > limits.get(d.spec.uuid, d.spec.limit_mib) << 20
            }
            if not in_use:
                resized = tuple(
                    replace(d, limit_mib=limits.get(d.uuid, d.limit_mib)) for d in self.spec.devices
                )
                self.spec = replace(self.spec, devices=resized)
                for device, spec in zip(devices, resized):
                    device.resize(spec)
            return in_use

    # -- connections

    def _accept(self, listener: socket.socket) -> None:
        while not self._over:
            try:
                sock = _arrival(listener)
            except OSError:
                return
            if sock is None:
                continue
            with self._lock:
                self._strangers[sock] = time.monotonic()
                before = (
                    next(iter(self._strangers.values())) if len(self._strangers) > _MOST_STRANGERS else 0.0
                )
            self._turn_away(before)
            threading.Thread(target=self._serve, args=(sock,), name="client", daemon=True).start()

    def _turn_away(self, before: float) -> None:
        """Whoever came before that and has not shown the secret yet."""
        with self._lock:
            late = [sock for sock, came in self._strangers.items() if came <= before]
        for sock in late:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.ExitStack() as closing:
            # By a second descriptor a connection can be ended while its thread is anywhere in TLS.
            stranger = closing.enter_context(sock)
            try:
                twin = sock.dup()
                conn = handshake.secured(twin, self.spec) if self.spec.certfile else twin
                closing.enter_context(conn)
                hello = handshake.admit(
                    conn, self.spec, {"torch": torch.__version__, "devices": self._facts()}
                )
            except (handshake.Refused, ConnectionError, wire.WireError, OSError):
                return
            finally:
                with self._lock:
                    del self._strangers[stranger]
                stranger.close()
            if hello["role"] == "holder":
                self._hold(conn)
            else:
                self._work(conn, hello)

    def _facts(self) -> list[dict[str, Any]]:
        return [{"name": d.name, "limit_mib": d.limit_mib, "emulated": d.emulated} for d in self.spec.devices]

    def _hold(self, sock: tls.Connection) -> None:
        with self._lock:
            self._holders[sock] = time.monotonic()
            self._held_at = self._held_at or time.time()
        code = EXIT_HOLDER_LOST
        try:
            while True:
                kind, _, length = wire.receive(sock, wire.MAX_HELLO)
                if length:
                    break
                if kind is wire.Kind.BYE:
                    code = EXIT_RELEASED
                    break
                with self._lock:
                    self._holders[sock] = time.monotonic()
        except (ConnectionError, wire.WireError, OSError):
            pass  # the holder is gone; that is all there is to know
        with self._lock:
            del self._holders[sock]
            last = not self._holders
        if last:
            self.end(code)

    def _work(self, sock: tls.Connection, hello: dict[str, Any]) -> None:
        send_lock = threading.Lock()

        def send(kind: wire.Kind, header: Any, payload: memoryview | None = None) -> None:
            with send_lock:
                wire.send(sock, kind, header, payload)

        with self._lock:
            full = len(self._sessions) >= _MOST_SESSIONS
        if full:
            with contextlib.suppress(ConnectionError):
                send(wire.Kind.BYE, {"message": f"{_MOST_SESSIONS} processes use this lease already"})
            return
        threads = hello.get("threads")
        if isinstance(threads, int) and 0 < threads <= 1024 and self.spec.devices[0].emulated:
            # An emulated GPU sums in the same order as the client's own CPU would.
            torch.set_num_threads(threads)
        session = Session(
            self.devices(),
            answer=lambda header, payload: send(wire.Kind.VALUE, header, payload),
            complain=lambda report: send(wire.Kind.ERROR, report),
        )
        incoming = Incoming(sock, max(d.limit_mib for d in self.spec.devices) << 20)
        with self._lock:
            self._sessions.add(sock)
        try:
            with torch.inference_mode():
                self._loop(sock, session, incoming)
        except (BadRecord, wire.WireError) as e:
            try:
                send(wire.Kind.BYE, {"message": f"the worker ended this session: {e}"})
            except ConnectionError:
                pass  # it cannot be told any more
        except (ConnectionError, OSError):
            pass  # the client is gone
        finally:
            incoming.close()
            session.close()
            with self._lock:
                self._sessions.discard(sock)

    def _loop(self, sock: tls.Connection, session: Session, incoming: Incoming) -> None:
        while True:
            frame = incoming.next()
            if frame.kind is wire.Kind.RECORDS and not frame.length:
                with incoming.meanwhile():
                    session.run(frame.header)
            elif frame.kind is wire.Kind.UPLOAD:
                self._upload(sock, session, frame)
            elif frame.kind is wire.Kind.BYE:
                return
            elif frame.kind is not wire.Kind.PING:
                raise wire.WireError(f"unexpected {frame.kind.name}")

    def _upload(self, sock: tls.Connection, session: Session, frame: Frame) -> None:
        """Straight into the tensor where the elements are still in the connection."""
        try:
            id, geom = frame.header
        except (TypeError, ValueError):
            raise BadRecord("an upload that names no tensor") from None
        payload = frame.payload

        def receive(view: memoryview) -> None:
            if payload is None:
                wire.receive_into(sock, view)
            elif len(view):
                torch.frombuffer(view, dtype=torch.uint8).copy_(payload)

        session.upload(id, geom, frame.length, receive)

    # -- what others are told

    def _tell(self, elapsed: float) -> None:
        devices = self._devices or []
        busy = {}
        for d in devices:
            before = self._busy_before.get(d.spec.uuid, 0.0)
            # Rounded up: who computed at all, however little, is not idle.
            busy[d.spec.uuid] = math.ceil(min(1.0, (d.busy_s - before) / elapsed) * 100) / 100
            self._busy_before[d.spec.uuid] = d.busy_s
        state = {
            "allocated_bytes": {d.spec.uuid: d.allocated for d in devices},
            "busy": busy,
            "sessions": len(self._sessions),
            "held_at": self._held_at,
        }
        if state != self._reported:
            self._reported = state
            self._report(state)

    def _say_goodbye(self) -> None:
        reason = {
            EXIT_FENCED: "nothing was heard of its holder",
            EXIT_HOLDER_LOST: "its holder went away",
            EXIT_RELEASED: "the lease was released",
            EXIT_STOPPED: "the pool ended the lease",
        }.get(self._code, "the lease ended")
        with self._lock:
            socks = [*self._holders, *self._sessions]
        for sock in socks:
            try:
                sock.settimeout(0.2)
                sock.sendall(wire.pack(wire.Kind.BYE, {"message": reason}))
            except OSError:
                pass  # it is gone already


def _arrival(listener: socket.socket) -> socket.socket | None:
    """The next connection; None where nothing but a word came. Raises OSError when there will be no more."""
    if listener.family != socket.AF_UNIX:
        return listener.accept()[0]
    _, descriptors, _, _ = socket.recv_fds(listener, 16, 1)
    return socket.socket(fileno=descriptors[0]) if descriptors else None
