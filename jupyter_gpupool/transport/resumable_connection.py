"""The client's end of a session: connects again when a connection is lost, and goes on where it was."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from . import frames, tls
from .frame_reader import FrameReader
from .handshake import MovedAway, Refused, connect_first, moved_to
from .polling import READABLE, new_poll
from .resumption import ACKNOWLEDGE_BYTES, BadNumbers, ClientEnd, Frame

#: Connects with these fields of the hello, within so many seconds; returns the connection and the welcome.
Connect = Callable[[dict[str, Any], float], tuple[tls.Connection, dict[str, Any]]]

#: How long a connection attempt may take, and the pauses between attempts, in seconds.
_ATTEMPT_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
#: A GPU server that says for so long that it has no such worker is believed, in seconds.
NO_WORKER_S = 2.0
#: A program that cannot go on for so long is shown one line, in seconds.
NOTICE_AFTER_S = 2.0
#: The buffers for copies of uploads that are kept for the next ones, a whole window of them, and the bytes of each.
_MAX_SPARE = 8
COPY_BYTES = 8 << 20
#: How long a larger payload that was sent is waited for, in seconds, before it is copied after all.
_LENT_WAIT_S = 0.05


class SessionLost(Exception):
    """The session cannot go on; the message is the reason. ``is_replaced``: another worker may follow."""

    def __init__(self, reason: str, is_replaced: bool = False) -> None:
        super().__init__(reason)
        self.is_replaced = is_replaced


class ResumableConnection:
    """A session with a worker, through as many connections as it takes.

    ``where`` names the worker for people; ``on_error`` is called with each report of a failed operator. ``on_moved`` is
    called where the worker says that the lease goes on elsewhere; from then on ``connect`` connects there. A connection
    on which nothing is heard for ``silence_s`` seconds, although something is due, is given up.
    Its caller ensures that one thread at a time uses it; only :meth:`lose` may be called by any other.
    Every method may be interrupted by an exception of a signal handler and called again.
    Raises what ``connect`` raises for the first connection.
    """

    def __init__(
        self,
        connect: Connect,
        where: str,
        silence_s: float = 15.0,
        on_error: Callable[[Any], None] = lambda report: None,
        on_moved: Callable[[MovedAway], None] = lambda where: None,
    ) -> None:
        self._on_moved = on_moved
        self._connect = connect
        self._where = where
        self._silence_s = silence_s
        #: called with each report of a failed operator
        self.on_error = on_error
        #: called with each answer that nobody waits for in :meth:`answer`: the number of the frame that asked, the
        #: answer, the bytes of its payload, and what fills a buffer with them. All of them have to be read.
        self.on_answer: Callable[[int, Any, int, Callable[[memoryview], None]], None] | None = None
        self.end = ClientEnd()
        self._spare: list[bytearray] = []
        self._sock: tls.Connection | None = None
        self._poll = new_poll()
        self._transmitted = 0
        self._lost_at: float | None = None
        self._why = ""
        self._refused_at: float | None = None
        self._pause_s = 0.0
        self._notice: threading.Timer | None = None
        self._over = threading.Event()
        self._over_why = ""
        #: counters for benchmarks and tests
        self.reconnects = 0
        sock, self.welcome = connect_first(
            lambda: connect({**self.end.hello(), "new": True}, _ATTEMPT_TIMEOUT_S)
        )
        self.resume_s = float(self.welcome.get("resume_s", 0.0))
        self._window_bytes = int(self.welcome.get("window_mib", 64)) << 20
        self._use(sock)

    # -- sending

    def send(self, frame: Frame) -> None:
        """Send a frame that counts, after those that were sent before. Raises SessionLost.

        A frame that has a number is not sent twice. Waits while the window is full.
        """
        end = self.end
        if not frame.number and not end.has_room(self._window_bytes):
            while not end.has_room(self._window_bytes):
                self._take_lasting(0, None)
            if self.on_answer is not None:
                self.listen()  # an answer that came along may be all that arrives
        end.keep(frame)
        if self._sock is None:
            self._restore()
        else:
            try:
                self._transmit()
            except OSError as e:
                self._restore(e)

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as this end has noticed."""
        return self._sock is not None

    def fileno(self) -> int:
        """The descriptor of the connection, to be polled by any thread; -1 while there is none."""
        sock = self._sock
        return -1 if sock is None else sock.fileno()

    def keep_lent(self) -> None:
        """Copy the lent payloads that may have to be sent again. Raises as :meth:`answer`.

        Called before their memory changes. Most of a long upload is acknowledged by then, and is not copied; a payload
        of more than COPY_BYTES soon is, unless the worker is busy.
        """
        try:
            if self._sock is not None:
                self.listen()
            until = time.monotonic() + _LENT_WAIT_S
            while (left_s := until - time.monotonic()) > 0 and self._is_large_lent():
                if self._sock is None or self._reader.has_data(self._poll, left_s * 1000):
                    self.listen()
        finally:
            for frame in self.end.kept:
                if frame.lent:
                    assert frame.payload is not None
                    frame.payload = self._copy(frame.payload)
                    frame.lent = False

    def _is_large_lent(self) -> bool:
        return any(f.lent and f.payload is not None and f.payload.nbytes > COPY_BYTES for f in self.end.kept)

    def _copy(self, data: memoryview) -> memoryview:
        if data.nbytes > COPY_BYTES:
            return memoryview(bytes(data))
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = bytearray(COPY_BYTES)
        copied = memoryview(buffer)[: data.nbytes]
        copied[:] = data
        return copied

    def _transmit(self) -> None:
        """Send the frames that were not sent on this connection yet. Raises OSError."""
        sock = self._sock
        assert sock is not None
        try:
            for frame in self.end.after(self._transmitted):
                frames.send_all(sock, frame.head)
                if frame.payload is not None:
                    frames.send_all(sock, frame.payload)
                self._transmitted = frame.number
        except OSError:
            self._hear_last_words(sock)
            self._drop()
            raise
        except BaseException:
            self._drop()  # a part of the frame may be on its way
            raise

    def _hear_last_words(self, sock: tls.Connection) -> None:
        """Raise SessionLost if the worker gave a reason before it closed the connection.

        Reports of failed operators come first: one of them may be why it ends.
        """
        reports = []
        try:
            reader = self._reader
            while reader.has_data(self._poll, 0):
                kind, header, length, _ = reader.receive()
                if kind is frames.Kind.ERROR:
                    reports.append(header)  # not counted, so the next connection would bring it again
                if kind is frames.Kind.BYE and isinstance(header, dict):
                    where = moved_to(header)
                    if where is not None:  # there, reports that were not counted come again
                        self._on_moved(where)
                        return
                    self._drop()
                    for report in reports:
                        self.on_error(report)
                    raise _said(header)
                reader.discard(length)
        except (OSError, frames.WireError):
            pass  # it gave none

    def _say(self, data: bytes) -> None:
        """Send what does not count. Raises OSError."""
        assert self._sock is not None
        try:
            frames.send_all(self._sock, data)
        except BaseException:
            self._drop()
            raise

    # -- receiving

    def answer(self, number: int, into: memoryview | None) -> Any:
        """Wait for the answer to the question in frame ``number``; its payload is read into ``into``.

        Answers to earlier questions, which nobody waits for any more, are read and forgotten.
        Raises SessionLost, and :class:`~.frames.WireError` for what the worker must not send.
        """
        is_large = into is not None and into.nbytes >= ACKNOWLEDGE_BYTES
        while True:
            if is_large and self.end.owes and self._sock is not None:
                self._acknowledge()  # the worker keeps what is not acknowledged, and may have no room for so much more
            found, answer = self._take_lasting(number, into)
            if found:
                return answer

    def listen(self) -> None:
        """Read what has arrived, and connect again if the connection is lost. Raises as :meth:`answer`."""
        while True:
            if self._sock is None:
                self._restore()
            if not self._reader.has_data(self._poll, 0):
                return
            self._take_lasting(0, None)

    def _take_lasting(self, number: int, into: memoryview | None) -> tuple[bool, Any]:
        """Read one frame, on whatever connection."""
        while True:
            if self._sock is None:
                self._restore()
            try:
                self._until_readable()
                return self._take(number, into)
            except OSError as e:
                self._restore(e)

    def _until_readable(self) -> None:
        """Wait for the next bytes. Raises ConnectionLost if the connection stays silent even when it is pinged."""
        if self._reader.has_data(self._poll, self._silence_s / 3 * 1000):
            return
        self._say(frames.pack(frames.Kind.PING, None))
        if not self._reader.has_data(self._poll, self._silence_s / 3 * 2000):
            self._drop()
            raise frames.ConnectionLost(f"nothing was heard for {self._silence_s:g} s")

    def _take(self, number: int, into: memoryview | None) -> tuple[bool, Any]:
        """Read one frame. Return whether it is the answer to frame ``number``, and the answer."""
        reader, end = self._reader, self.end
        try:
            kind, header, length, _ = reader.receive()
            if kind is frames.Kind.ACK:
                self._forget(header)
                return False, None
            if kind is frames.Kind.BYE:
                where = moved_to(header)
                if where is not None:
                    self._on_moved(where)
                    raise where
                raise _said(header)
            found = False
            if kind is frames.Kind.VALUE:
                asked, answer = header if isinstance(header, list) and len(header) == 2 else (None, None)
                found = bool(number) and asked == number
                if self.on_answer is not None and asked is not None and not found:
                    self.on_answer(asked, answer, length, reader.receive_into)
                elif length:
                    if found and (into is None or length != into.nbytes):
                        raise frames.WireError(f"an unexpected answer of {length} bytes")
                    if found and into is not None:
                        reader.receive_into(into)
                    else:
                        reader.discard(length)
                self._forget(asked)
            elif kind is frames.Kind.ERROR:
                answer = None
                self.on_error(header)
            else:
                raise frames.WireError(f"unexpected {kind.name}")
            end.take(length)
        except BadNumbers as e:
            self._drop()
            raise frames.WireError(str(e)) from None
        except BaseException:
            self._drop()  # the stream is somewhere inside a frame
            raise
        if end.must_acknowledge:
            self._acknowledge()
        return found, answer

    def _acknowledge(self) -> None:
        done = self.end.done
        with contextlib.suppress(
            OSError
        ):  # what was received is here, and the next connection acknowledges it
            self._say(frames.pack(frames.Kind.ACK, done))
        self.end.acknowledged_up_to(done)

    def _forget(self, last: Any) -> None:
        for frame in self.end.acknowledge(last):
            payload = frame.payload
            buffer = None if payload is None or frame.lent else payload.obj
            if type(buffer) is bytearray and len(self._spare) < _MAX_SPARE:
                self._spare.append(buffer)

    # -- connections

    def _use(self, sock: tls.Connection) -> None:
        sock.settimeout(self._silence_s)
        self._poll = new_poll()
        self._poll.register(sock, READABLE)
        self._reader = FrameReader(sock)
        self._sock = sock
        if self._notice is not None:
            self._notice.cancel()
        self._notice = self._lost_at = self._refused_at = None
        self._pause_s = 0.0

    def _drop(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
        if self._lost_at is None:
            self._lost_at = time.monotonic()

    def _restore(self, cause: OSError | None = None) -> None:
        """Connect again, and send what the worker has not received. Raises SessionLost."""
        self._drop()
        assert self._lost_at is not None
        if cause is not None:
            self._why = str(cause)
        if self._notice is None and not self._over.is_set():
            left = max(0.0, self._lost_at + NOTICE_AFTER_S - time.monotonic())
            self._notice = threading.Timer(left, self._show_notice)
            self._notice.daemon = True
            self._notice.start()
        try:
            while not self._attempt():
                pass
        except (SessionLost, frames.WireError):
            if self._notice is not None:
                self._notice.cancel()
            raise

    def _attempt(self) -> bool:
        """Try once to connect. Return whether all is sent again; raises SessionLost where there is no point."""
        assert self._lost_at is not None
        self._over.wait(self._pause_s)
        if self._over.is_set():
            raise SessionLost(self._over_why)
        now = time.monotonic()
        left = self._lost_at + self.resume_s - now
        if left <= 0:
            raise SessionLost(f"no connection to it for {self.resume_s:g} s: {self._why}")
        self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
        sock = None
        try:
            sock, welcome = self._connect(self.end.hello(), min(_ATTEMPT_TIMEOUT_S, max(1.0, left)))
            again = self.end.welcomed(welcome)
            self._transmitted = again[0].number - 1 if again else self.end.sent
            self._use(sock)
            sock = None
            self.reconnects += 1
            self._transmit()
            return True
        except (Refused, BadNumbers) as e:
            raise SessionLost(str(e)) from None
        except frames.NoWorker as e:
            self._refused_at = self._refused_at or now
            if time.monotonic() - self._refused_at >= min(NO_WORKER_S, self.resume_s):
                raise SessionLost("the worker went away without a word") from None
            self._why = str(e)
        except (OSError, frames.WireError) as e:
            self._refused_at = None
            self._why = str(e)
        finally:
            if sock is not None:
                sock.close()
        return False

    def _show_notice(self) -> None:
        if self._sock is None and not self._over.is_set():
            print(f"reconnecting to {self._where} …", file=sys.stderr, flush=True)

    # -- the end

    def lose(self, reason: str) -> None:
        """Raise SessionLost with ``reason`` from now on. Wakes a thread that waits."""
        if not self._over.is_set():
            self._over_why = reason
            self._over.set()
            sock = self._sock
            if sock is not None:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # closed already

    def close(self) -> None:
        """End the session, if there is a connection to say so."""
        if self._sock is not None and not self._over.is_set():
            try:
                frames.send(self._sock, frames.Kind.BYE, None)
            except OSError:
                pass  # the worker ends the session when nobody comes back
        self.lose("it was released")
        if self._notice is not None:
            self._notice.cancel()
        self._drop()

    def forked(self, reason: str) -> None:
        """In a forked child: leave the connection to the parent."""
        self._over_why = reason
        self._over = threading.Event()
        self._over.set()
        self._notice = None
        sock, self._sock = self._sock, None
        if sock is not None and sock.fileno() >= 0:
            os.close(sock.detach())


def _said(header: Any) -> SessionLost:
    """What a worker's last frame says."""
    said = header if isinstance(header, dict) else {}
    return SessionLost(str(said.get("message") or "the worker ended"), said.get("replaced") is True)
