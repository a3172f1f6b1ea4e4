"""A session as the worker keeps it: through all its connections, until it ends or nobody comes back."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jupyter_gpupool.transport import frames
from jupyter_gpupool.transport.resumption import BadNumbers, Frame, WorkerEnd
from jupyter_gpupool.transport.tls import Connection

from .device import HostCopy
from .read_ahead import Incoming, SessionOver

if TYPE_CHECKING:
    from .executor import WorkerSession
    from .other_frameworks import OtherSession

#: The bytes of answers that are kept, above which the worker waits for the client to acknowledge.
_MAX_KEPT_BYTES = 64 << 20
#: A payload of up to so many bytes is sent in one piece with what comes before it.
_MAX_JOINED_BYTES = 16 << 10
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
        self._state = threading.Lock()  # a condition's own methods would take several times as long
        self._changed = threading.Condition(self._state)
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
        #: what executes its frames
        self.session: WorkerSession | OtherSession | None = None
        #: whether its client goes along when the lease moves
        self.follows = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._sock is not None and self.lost_at is None

    @property
    def is_over(self) -> bool:
        """Whether nobody has come back."""
        return self._over

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

    def answer(self, header: Any, copy: HostCopy | None) -> None:
        """Send the answer to the frame that is being executed, now or on a later connection.

        What a device copies to the host is sent piece by piece, as it arrives. Waits while the client does not
        acknowledge what was sent before. Raises SessionOver; and what the copy raises, after it has ended the session,
        because a part of it may have been sent.
        """
        numbered = [self.end.done + 1, header]
        if copy is None:
            frame = Frame(frames.pack(frames.Kind.VALUE, numbered))
        else:
            head = frames.pack(frames.Kind.VALUE, numbered, copy.nbytes)
            if copy.nbytes <= _MAX_JOINED_BYTES:
                frame, copy = Frame(head + copy.wait()), None
            else:
                frame = Frame(head, copy.view)
        while not self._send(frame, copy):
            with self._state:
                while not self.end.has_room(_MAX_KEPT_BYTES) and not self._over:
                    self._changed.wait()
                if self._over:
                    raise SessionOver

    def complain(self, report: dict[str, Any]) -> None:
        """Send the report of an operator that failed. A client that has very many to read gets no more."""
        self._send(Frame(frames.pack(frames.Kind.ERROR, report)))

    def _send(self, frame: Frame, copy: HostCopy | None = None) -> bool:
        """Send a frame that counts; False if the client has to acknowledge others before.

        Raises what ``copy`` raises, which arrives while it is sent.
        """
        with self._sending:
            with self._state:
                if self._over or not self.end.has_room(_MAX_KEPT_BYTES):
                    return False
                self.end.keep(frame)
                if not self.id:
                    self.end.acknowledge(frame.number)
            if copy is None:
                self._transmit(frame)
                return True
            try:
                self._transmit(frame, copy.pieces())
                copy.wait()  # before another connection sends it as a whole
            except Exception:
                if self._sock is not None:
                    self._break(self._sock)
                self.expire()
                raise
        return True

    def finish(self, frame_bytes: int) -> None:
        """Count a frame as executed."""
        with self._state:
            self.end.received = self.incoming.received
            self.end.finish(frame_bytes)
            due = self.id and self.end.must_acknowledge
        if due:
            self._acknowledge()

    def say(self, message: str, **more: Any) -> None:
        """End the session for the client, with the reason."""
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.settimeout(0.2)
                frames.send_all(sock, frames.pack(frames.Kind.BYE, {"message": message, **more}))

    def describe(self) -> dict[str, Any]:
        """Describe the session at rest, for the worker with which its client goes on.

        What was read ahead is not part of it: its client sends it again.
        """
        with self._state:
            numbers = replace(self.end.numbers(), received=self.end.done)
            kept = [
                [frame.head, None if frame.payload is None else bytes(frame.payload)]
                for frame in self.end.kept
            ]
        return {"id": self.id, "process": self.process, "numbers": numbers.to_json(), "kept": kept}

    def _transmit(self, frame: Frame, pieces: Iterable[memoryview] = ()) -> None:
        """Send a frame, with its payload as ``pieces`` where those arrive only now. Called with the lock of senders.

        Raises what ``pieces`` raises.
        """
        sock = self._sock
        if sock is None:
            return
        try:
            frames.send_all(sock, frame.head)
            for piece in pieces or ([] if frame.payload is None else [frame.payload]):
                frames.send_all(sock, piece)
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
                self._changed.notify_all()
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
            self._changed.notify_all()
        self.incoming.close()

    def close(self) -> None:
        """Close what is open. Called by the thread that executes, in the end."""
        self.expire()
        with self._sending:
            sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
