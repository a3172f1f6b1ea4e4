"""A client that says what no client says, over sessions that it resumes as it likes, and counts what was read."""

from __future__ import annotations

import contextlib
import random
import secrets
import select
import socket
from collections.abc import Iterator
from typing import Any

import msgpack

from jupyter_gpupool.pytorch.protocol import commands as codes
from jupyter_gpupool.transport import frames, handshake
from jupyter_gpupool.transport.specs import AttachSpec

from .mutations import damaged, mutated
from .worker_programs import GEOM, program

#: How many frames are sent before what the worker says is read.
_BATCH = 16
#: Commands of a program, after those that set it up.
_LENGTH = 200
#: The chance that a frame is not as a client would send it.
_CHANGED = 0.02
_PATIENCE_S = 300.0
#: Who may wait for another rank for as long as it likes is not waited for.
_LISTENS_S = 1.0


class FuzzedSession:
    """One session of made-up frames on a worker.

    ``operators``: names to put in place of others. ``read``: how many frames the worker is known to have read.
    ``said``: everything that it sent. ``ran``: the operators that it says it ran.
    """

    def __init__(
        self, spec: AttachSpec, rng: random.Random, facts: dict[str, Any], operators: tuple[str, ...]
    ):
        self._spec = spec
        self._rng = rng
        self._facts = facts
        self._operators = operators
        self._id = secrets.token_hex(16)
        self._generation = 0
        self._received = 0
        self._sent: list[bytes] = []
        self._base = 0
        self._sock: socket.socket | None = None
        self._unread = b""
        self.read = 0
        self.said = bytearray()
        self.ran: set[str] = set()

    def run(self) -> None:
        """Say a whole program, changed here and there, until its end or until the worker has had enough."""
        try:
            if not self._connect():
                return
            batch: list[bytes] = []
            for frame in self._frames():
                batch.append(frame)
                if len(batch) == _BATCH:
                    if not self._say(batch):
                        return
                    batch = []
                    if self._rng.random() < 0.02 and not self._connect():
                        return
            if self._say(batch):
                self._finish()
        except OSError:
            pass  # it hung up, as it may at any point
        finally:
            if self._sock is not None:
                self._sock.close()

    # -- what is said

    def _frames(self) -> Iterator[bytes]:
        rng = self._rng
        first, commands = program(rng, _LENGTH)
        yield frames.pack(frames.Kind.RECORDS, [codes.TRACE, True])
        queue = [self._named(fields) for who, *fields in (*first, *commands) if who == "a"]
        while queue:
            n = rng.randint(1, 3)
            taken, queue = queue[:n], queue[n:]
            records = [value for command in taken for value in command]
            frame = frames.pack(frames.Kind.RECORDS, records)
            if rng.random() < _CHANGED:
                with contextlib.suppress(OverflowError):  # a number that no frame can say
                    frame = self._changed(records)
            yield frame

    def _named(self, fields: list[Any]) -> list[Any]:
        """A command with names of its own for what it sends to other sessions: no other program has the same."""
        return [
            bytes.fromhex(self._id)[:8] + f[8:] if isinstance(f, bytes) and len(f) == 16 else f
            for f in fields
        ]

    def _changed(self, records: list[Any]) -> bytes:
        rng = self._rng
        how = rng.randrange(20)
        if how == 0:  # it may be no frame at all
            return damaged(rng, frames.pack(frames.Kind.RECORDS, records))
        if how == 1:
            payload = rng.randbytes(rng.choice((0, 1, 24, 24, 24, 100)))
            head = mutated(rng, [rng.randrange(40), GEOM])
            return frames.pack(frames.Kind.UPLOAD, head, len(payload)) + payload
        if how == 2:
            return frames.pack(frames.Kind.UPLOAD, [rng.randint(1, 40), GEOM], 24) + rng.randbytes(24)
        if how == 3:
            kind = rng.choice(list(frames.Kind))
            return frames.pack(kind, mutated(rng, {"message": "", "numbers": [1, 2]}))
        if how == 4:
            code = rng.choice(list(codes.FIELDS))
            fields = [mutated(rng, 1, self._operators) for _ in range(codes.FIELDS[code])]
            if code in (codes.MEET, codes.TAKE, codes.FETCH):
                fields[-1] = rng.choice((0, 0.01, -1, "", None))  # how long it waits
            return frames.pack(frames.Kind.RECORDS, [*records, code, *fields])
        if how == 5:
            records = mutated(rng, records)
        return frames.pack(frames.Kind.RECORDS, mutated(rng, records, self._operators))

    # -- connections

    def _connect(self) -> bool:
        """Connect for the first time, or again: with the numbers that are right, or with others. False if refused."""
        if self._sock is not None:
            self._sock.close()
        self._unread = b""
        self._generation += 1
        facts: dict[str, Any] = {
            "session": self._id,
            "generation": self._generation,
            "received": self._received,
            "new": self._generation == 1,
            **self._facts,
        }
        if self._rng.random() < 0.1:
            name = self._rng.choice(list(facts))
            facts[name] = mutated(self._rng, facts[name])
        try:
            conn, welcome = handshake.connect(self._spec, "session", facts, timeout_s=_PATIENCE_S)
        except (handshake.Refused, frames.WireError, OverflowError):  # the last: what no frame can say
            return False
        assert isinstance(conn, socket.socket), "a worker of a test has no TLS"
        self._sock = socket.socket(fileno=conn.detach())
        self._sock.settimeout(_LISTENS_S)
        known = welcome.get("received", 0)
        self._count(known)
        if known > self._base + len(self._sent):
            raise AssertionError(f"it has received {known} of {self._base + len(self._sent)} frames")
        again = self._sent[known - self._base :] if known >= self._base else []
        if again:
            self._sock.sendall(b"".join(again))
        return True

    def _say(self, batch: list[bytes]) -> bool:
        """Send some frames and read what is there; False if the worker has hung up."""
        assert self._sock is not None
        self._sent += batch
        self._sock.sendall(b"".join(batch))
        return self._hear(wait=False)

    def _finish(self) -> None:
        assert self._sock is not None
        last = self._base + len(self._sent) + 1
        self._sent.append(frames.pack(frames.Kind.RECORDS, [codes.TRACE, False]))
        self._sock.sendall(self._sent[-1] + frames.pack(frames.Kind.PING, None))
        while self.read < last and self._hear(wait=True):
            pass
        self._sock.sendall(frames.pack(frames.Kind.BYE, None))

    def _hear(self, wait: bool) -> bool:
        assert self._sock is not None
        counted = 0
        while wait or select.select([self._sock], [], [], 0)[0]:
            data = self._sock.recv(1 << 20)
            if not data:
                return False
            self.said += data
            self._unread += data
            for kind, header in self._answers():
                if kind == frames.Kind.ACK:
                    self._count(header)
                elif kind == frames.Kind.BYE:
                    self._count(self.read + 1)  # the frame that was too much
                    return False
                elif kind in (frames.Kind.VALUE, frames.Kind.ERROR):
                    self._received += 1
                    counted += 1
                    self._note(header)
            wait = False
        if counted:
            self._sock.sendall(frames.pack(frames.Kind.ACK, self._received))
        return True

    def _answers(self) -> Iterator[tuple[int, Any]]:
        size = frames.PREFIX.size
        while len(self._unread) >= size:
            kind, header, payload = frames.PREFIX.unpack_from(self._unread)
            end = size + header + payload
            if len(self._unread) < end:
                return
            head, self._unread = self._unread[size : size + header], self._unread[end:]
            yield kind, msgpack.unpackb(head, strict_map_key=False)

    def _note(self, header: Any) -> None:
        if (
            isinstance(header, list)
            and len(header) == 2
            and isinstance(header[1], dict)
            and "calls" in header[1]
        ):
            self.ran |= {call[0] for call in header[1]["calls"]}

    def _count(self, number: int) -> None:
        self.read = max(self.read, number)
        done = self.read - self._base
        if 0 < done <= len(self._sent):
            del self._sent[:done]
            self._base = self.read
