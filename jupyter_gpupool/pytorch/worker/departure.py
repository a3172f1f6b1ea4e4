"""The worker that a lease leaves: sends all that the lease is to another worker, and shows clients the way.

:meth:`Departure.send` ends with every session at rest and the other worker knowing everything. Then the engine decides:
:meth:`~Departure.stay`, or :meth:`~Departure.leave`. Until it has, neither worker executes anything.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from jupyter_gpupool.transport import frames, handshake, tls
from jupyter_gpupool.transport.specs import EXIT_MOVED, AttachSpec

from . import lease_state
from .executor import WorkerSession
from .other_frameworks import OtherSession
from .residence import CannotPark
from .sent_ahead import SentAhead
from .state_stream import StateWriter

if TYPE_CHECKING:
    from .worker import Worker

#: How long the other worker may take to accept a connection, and to go on reading or answer, in seconds.
_CONNECT_TIMEOUT_S = 10.0
_PROGRESS_TIMEOUT_S = 30.0
#: How long clients that are just being let in may take, in seconds.
_ADMISSION_TIMEOUT_S = 10.0


class CannotMove(Exception):
    """The lease cannot leave this worker now; the message is the reason."""


class _Sending:
    """What is on its way to the other worker. ``nbytes``: how much of it has been sent."""

    def __init__(self, conn: tls.Connection, ahead: SentAhead) -> None:
        self.conn = conn
        self.ahead = ahead
        self.writer: StateWriter | None = None
        self.nbytes = 0

    def write(self, view: memoryview) -> None:
        """Send bytes. Raises OSError."""
        frames.send_all(self.conn, view)
        self.nbytes += len(view)


class Departure:
    """``is_sent``: the other worker has everything, and the engine is to decide."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.is_sent = False
        self._sending: _Sending | None = None
        #: where the lease goes on, once it has left
        self.where: tuple[str, int] | None = None

    def send(self, host: str, port: int, secure: bool, sock: socket.socket | None = None) -> dict[str, Any]:
        """Send everything to the worker at that address. Return the bytes, the seconds that sessions rested, and how
        many bytes were sent ahead, while they went on.

        ``sock``: a connection to it, because this process may make none. It is closed.
        Raises CannotMove; then the lease goes on here.
        """
        self.begin(host, port, secure, sock)
        return self.finish()

    @torch.inference_mode()
    def begin(self, host: str, port: int, secure: bool, sock: socket.socket | None = None) -> None:
        """Send memory ahead, while the sessions go on: as :meth:`send`, up to :meth:`finish` or :meth:`stay`."""
        worker = self._worker
        if self.is_sent or self._sending is not None:
            if sock is not None:
                sock.close()
            raise CannotMove("it is about to leave already")
        spec = AttachSpec(worker.spec.lease_id, host, port, worker.secret, (), secure=secure)
        try:
            conn, _ = handshake.connect(spec, "worker", {}, _CONNECT_TIMEOUT_S, sock)
        except (handshake.Refused, frames.WireError, OSError) as e:
            raise CannotMove(f"the other worker cannot be reached: {e}") from None
        try:
            conn.settimeout(_PROGRESS_TIMEOUT_S)
            try:
                _hear(conn)
            except (frames.WireError, OSError) as e:
                raise CannotMove(f"the connection to the other worker broke: {e}") from None
            ahead = SentAhead(worker.residence)
            self._sending = _Sending(conn, ahead)
            self._sending.writer = self._send_ahead(ahead, self._sending.write)
        except BaseException:
            conn.close()
            self._give_up()
            raise

    @torch.inference_mode()
    def finish(self) -> dict[str, Any]:
        """Send what is left, while the sessions rest. Returns and raises as :meth:`send`."""
        worker, sending = self._worker, self._sending
        if sending is None or sending.writer is None:
            raise CannotMove("nothing was sent ahead")
        try:
            if not worker.admission.close(_ADMISSION_TIMEOUT_S):
                raise CannotMove("a client is just being let in")
            began = time.monotonic()
            try:
                self._send_at_rest(sending.conn, sending.ahead, sending.writer)
            except BaseException:
                worker.admission.open()
                raise
        except BaseException:
            self._give_up()
            raise
        sending.conn.close()
        self.is_sent = True
        rest_s = time.monotonic() - began
        return {"bytes": sending.nbytes, "rest_s": rest_s, "ahead": sending.ahead.nbytes}

    def _give_up(self) -> None:
        """The other worker is not to have what was sent."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.conn.close()
            sending.ahead.forget()

    def _send_ahead(self, ahead: SentAhead, write: Callable[[memoryview], None]) -> StateWriter:
        """Send memory while the sessions go on. Return what writes the rest."""
        self._worker.refuse_to_move()
        try:
            writer = StateWriter(self._worker.devices(), write)
            with contextlib.suppress(CannotPark):  # perhaps it can once the sessions rest
                ahead.send(writer)
            return writer
        except (frames.WireError, OSError) as e:
            raise CannotMove(f"the connection to the other worker broke: {e}") from None

    def _send_at_rest(self, conn: tls.Connection, ahead: SentAhead, writer: StateWriter) -> None:
        worker = self._worker
        try:
            worker.residence.rest()
        except CannotPark as e:
            raise CannotMove(str(e)) from None
        try:
            worker.refuse_to_move()
            served = worker.served()
            state, memories = lease_state.take(
                worker.devices(),
                [(one.describe(), one.session) for one in served if isinstance(one.session, WorkerSession)],
                worker.shared,
                others=[
                    (one.describe(), one.session) for one in served if isinstance(one.session, OtherSession)
                ],
            )
            there = ahead.finish(writer)
            for key, memory in memories.items():
                if key not in there:
                    writer.memory(key, memory)
            writer.state(state)
            frames.send(conn, frames.Kind.STATE, worker.describe())
            _hear(conn)
        except lease_state.Unparkable as e:
            worker.residence.go_on()
            raise CannotMove(str(e)) from None
        except (frames.WireError, OSError) as e:
            worker.residence.go_on()
            raise CannotMove(f"the connection to the other worker broke: {e}") from None
        except BaseException:
            worker.residence.go_on()
            raise

    def stay(self) -> None:
        """Go on here: the other worker is not to be used. Raises CannotMove if clients have been sent there."""
        if self.where is not None:
            raise CannotMove("it has left")
        was_sent, self.is_sent = self.is_sent, False
        self._give_up()
        if was_sent:
            self._worker.residence.go_on()
            self._worker.admission.open()

    def leave(self, host: str, port: int) -> None:
        """Send every client to the other worker, and end. Raises CannotMove if that one has not everything."""
        if not self.is_sent:
            raise CannotMove("it has not been sent")
        self.where = (host, port)
        self._worker.admission.redirect(host, port)
        self._worker.end(EXIT_MOVED)


def _hear(conn: tls.Connection) -> None:
    """Wait until the other worker agrees. Raises CannotMove with its reason, WireError and OSError."""
    kind, answer, _ = frames.receive(conn, frames.MAX_HELLO)
    if kind is not frames.Kind.STATE or not isinstance(answer, dict):
        raise frames.WireError(f"unexpected {kind.name}")
    if answer.get("failed"):
        raise CannotMove(f"the other worker cannot take it: {answer['failed']}")
