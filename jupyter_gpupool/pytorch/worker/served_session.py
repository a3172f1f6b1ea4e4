"""A session as the worker keeps it: through all its connections, until it ends or nobody comes back."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from jupyter_gpupool.transport import frames
from jupyter_gpupool.transport.resumption import BadNumbers, Frame, WorkerEnd
from jupyter_gpupool.transport.tls import Connection

from .read_ahead import Incoming, SessionOver

#: The bytes of answers that are kept, above which the worker waits for the client to acknowledge.
_MAX_KEPT_BYTES = 64 << 20
#: A process whose connection its own system has closed, and for which no holder vouches, is waited for this long.
CLOSED_GRACE_S = 2.0


def patience_s(closed: bool, lives: bool | None, resume_s: float) -> float:
    """How long a session or a holder without a connection is waited for, in seconds.

    ``closed``: its last connection was closed in order, as the system of a process that has ended does it, and not
    broken. ``lives``: whether its process lives, as a holder on the same machine sees it; None if there is none.
    """
    if lives is None:
        return min(resume_s, CLOSED_GRACE_S) if closed else resume_s
    return math.inf if lives else 0.0


class ServedSession:
    """A client's session. ``limit`` is the longest payload that it may send, in bytes.

    Without an ``id`` the session cannot be resumed: it ends with its connection.
    """

    def __init__(
        self, id: str, process: dict[str, Any] | None, limit: int, on_change: Callable[[], None]
    ) -> None:
        self.id = id
        #: names it within the worker
        self.key = id or uuid.uuid4().hex
        #: the process of the client: its machine, pid and birth
        self.process = process
        self.end = WorkerEnd(id)
        self.incoming = Incoming(None, limit, self._on_frame, self._on_idle, self._on_lost)
        self._on_change = on_change
        self._state = threading.Condition()
        self._sending = threading.Lock()
        self._resuming = threading.Lock()
        self._sock: Connection | None = None
        #: since when there is no connection, on a monotonic clock
        self.lost_at: float | None = None
        self.closed = False
        #: what a holder on the client's machine last said of its process
        self.lives: bool | None = None
        #: when holders were last asked for it
        self.probed_at = math.inf
        self._over = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._sock is not None and self.lost_at is None

    def expired(self, now: float, resume_s: float) -> bool:
        """Whether it has been without a connection for too long."""
        if self.lost_at is None:
            return False
        return not self.id or now - self.lost_at > patience_s(self.closed, self.lives, resume_s)

    # -- connections

    def resume(self, generation: Any, received: Any) -> dict[str, int]:
        """Let a newer connection win, and read no more from the one before. Return its fields of the welcome.

        Raises BadNumbers; then the session goes on as it was.
        """
        with self._state:
            self.end.refuse_older(generation)
        before = self._sock
        if before is not None:
            self._break(before)  # wakes whoever reads from it or writes to it
        with self._resuming:
            self.incoming.detach()
            with self._state:
                if self._over:
                    raise BadNumbers("it has ended")
                self.end.received = self.incoming.received
                fields = self.end.resume(generation, received)
                if self.lost_at is None:
                    self.lost_at = self.probed_at = time.monotonic()
                return fields

    def attach(self, sock: Connection, generation: int) -> bool:
        """Go on with the connection of that generation; False if a newer one has won meanwhile.

        Sends again what the client has not received. The session closes the connection in the end.
        """
        with self._resuming:
            with self._state:
                if self._over or generation != self.end.generation:
                    return False
                received = self.end.numbers().acknowledged
            with self._sending:
                before, self._sock = self._sock, sock
                if before is not None:
                    before.close()
                self.lost_at, self.lives, self.closed = None, None, False
                self.incoming.attach(sock)
                with self._state:
                    again = self.end.after(received)
                for frame in again:
                    self._transmit(frame)
        return True

    def _on_lost(self, sock: Connection, why: OSError) -> None:
        self._break(sock)
        self.closed = isinstance(why, frames.ConnectionClosed)
        self.lost_at = self.probed_at = time.monotonic()
        self._on_change()

    # -- sending

    def answer(self, header: Any, payload: memoryview | None) -> None:
        """Send the answer to the frame that is being executed, now or on a later connection.

        Waits while the client does not acknowledge what was sent before. Raises SessionOver.
        """
        numbered = [self.end.done + 1, header]
        head = frames.pack(frames.Kind.VALUE, numbered, 0 if payload is None else payload.nbytes)
        frame = Frame(head, payload)
        with self._state:
            while not self.end.has_room(frame.nbytes, _MAX_KEPT_BYTES) and not self._over:
                self._state.wait()
            if self._over:
                raise SessionOver
        self._send(frame)

    def complain(self, report: dict[str, Any]) -> None:
        """Send the report of an operator that failed. A client that has very many to read gets no more."""
        frame = Frame(frames.pack(frames.Kind.ERROR, report))
        with self._state:
            room = self.end.has_room(frame.nbytes, _MAX_KEPT_BYTES)
        if room:
            self._send(frame)

    def _send(self, frame: Frame) -> None:
        with self._sending:
            with self._state:
                self.end.keep(frame)
                if not self.id:
                    self.end.acknowledge(frame.number)
            self._transmit(frame)

    def finish(self, frame_bytes: int) -> None:
        """Count a frame as executed."""
        with self._state:
            self.end.received = self.incoming.received
            self.end.finish(frame_bytes)
            due = self.id and self.end.must_acknowledge
        if due:
            self._acknowledge()

    def say(self, message: str) -> None:
        """End the session for the client, with the reason."""
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.settimeout(0.2)
                frames.send_all(sock, frames.pack(frames.Kind.BYE, {"message": message}))

    def _transmit(self, frame: Frame) -> None:
        """Called with the lock of senders."""
        sock = self._sock
        if sock is None:
            return
        try:
            frames.send_all(sock, frame.head)
            if frame.payload is not None:
                frames.send_all(sock, frame.payload)
        except OSError:
            self._break(sock)

    def _break(self, sock: Connection) -> None:
        """A connection cannot be written to. Whoever reads from it notices now."""
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _acknowledge(self) -> None:
        with self._sending:
            sock = self._sock
            if sock is None:
                return
            with self._state:
                done = self.end.done
                self.end.acknowledged_up_to(done)
            try:
                frames.send_all(sock, frames.pack(frames.Kind.ACK, done))
            except OSError:
                self._break(sock)

    def _on_frame(self, kind: frames.Kind, header: Any) -> None:
        if kind is frames.Kind.ACK:
            with self._state:
                try:
                    self.end.acknowledge(header)
                except BadNumbers as e:
                    raise frames.WireError(str(e)) from None
                self._state.notify_all()
        elif self._sending.acquire(blocking=False):  # otherwise something is being sent, which says as much
            self._sending.release()
            self._acknowledge()

    def _on_idle(self) -> None:
        if self.id and self.end.owes:
            self._acknowledge()

    # -- the end

    def expire(self) -> None:
        """Let :meth:`Incoming.next` raise SessionOver: nobody has come back."""
        with self._state:
            self._over = True
            self._state.notify_all()
        self.incoming.close()

    def close(self) -> None:
        """Close what is open. Called by the thread that executes, in the end."""
        self.expire()
        with self._sending:
            sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
