"""What lets a session outlive its connections: numbers, acknowledgements, and what is sent again. No I/O.

Each end counts the frames of a session that it has sent and those that it has received, from the session's start and
through all its connections: RECORDS and UPLOAD one way, VALUE and ERROR the other. A frame carries no number, because
a connection delivers in order; a new connection begins with both ends' numbers. A frame is kept until the other end
has acknowledged it. What it has not received is sent again on the next connection, and nothing else is.
"""

from __future__ import annotations

import re
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: The most frames that an end keeps unacknowledged. Their bytes are limited by ``window_mib``.
MAX_KEPT_FRAMES = 1024
#: An end acknowledges at the latest after so many frames, or frames of so many bytes.
ACKNOWLEDGE_FRAMES = 64
ACKNOWLEDGE_BYTES = 1 << 20
#: A worker that has nothing to do acknowledges after so many seconds.
ACKNOWLEDGE_AFTER_S = 0.05

#: The form of a session's id: 128 random bits.
_ID = re.compile(r"[0-9a-f]{32}")
#: The highest number of a frame or a connection.
_MAX_NUMBER = (1 << 63) - 1


class BadNumbers(Exception):
    """The other end names frames or a connection that cannot be; the message is the reason."""


class Frame:
    """A frame to be sent: its bytes up to the payload, and the payload.

    ``number`` is its place in the session, from 1; 0 until an end has taken it. ``lent``: the payload is somebody's
    memory that will change.
    """

    __slots__ = ("head", "payload", "lent", "nbytes", "number")

    def __init__(self, head: bytes, payload: memoryview | None = None, lent: bool = False) -> None:
        self.head = head
        self.payload = payload
        self.lent = lent
        self.nbytes = len(head) + (0 if payload is None else payload.nbytes)
        self.number = 0


@dataclass(frozen=True)
class Numbers:
    """Where one end of a session stands. With the frames that it keeps, this is all that another connection needs.

    ``generation``: the number of the session's newest connection. ``sent``, ``acknowledged``: this end's last frame,
    and the last that the other end has acted on. ``received``, ``done``: the other end's last frame that is here, and
    the last that this end has acted on.
    """

    generation: int = 0
    sent: int = 0
    acknowledged: int = 0
    received: int = 0
    done: int = 0

    def to_json(self) -> dict[str, int]:
        """Return the numbers by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Numbers:
        """Return the numbers from their JSON form. Raises BadNumbers for what no session can have reached."""
        try:
            found = cls(**{name: number(value, name) for name, value in data.items()})
        except TypeError:
            raise BadNumbers("these are not the numbers of a session") from None
        if found.acknowledged > found.sent or found.done > found.received:
            raise BadNumbers("more frames are acknowledged than there were")
        return found


class SessionEnd:
    """What both ends have in common: the frames that were sent and are kept, and the count of those received.

    An exception of a signal handler may interrupt any method between two bytecodes. Each has one store that counts,
    and called again completes what it had begun.
    """

    def __init__(self, numbers: Numbers | None = None, kept: list[Frame] | None = None) -> None:
        start = numbers or Numbers()
        self.generation = start.generation
        self.received = start.received
        self.done = start.done
        self._told = start.done
        self._unacknowledged_bytes = 0
        self._acknowledged = start.acknowledged
        self._kept: deque[Frame] = deque(kept or ())
        self.kept_bytes = sum(frame.nbytes for frame in self._kept)

    def numbers(self) -> Numbers:
        """Return where this end stands."""
        return Numbers(self.generation, self.sent, self._acknowledged, self.received, self.done)

    # -- what this end sends

    @property
    def sent(self) -> int:
        """The number of this end's last frame."""
        return self._kept[-1].number if self._kept else self._acknowledged

    @property
    def kept(self) -> tuple[Frame, ...]:
        """The frames that the other end has not acknowledged."""
        return tuple(self._kept)

    def keep(self, frame: Frame) -> None:
        """Number a frame and keep it. A frame that has a place already keeps it."""
        last = self._kept[-1].number if self._kept else self._acknowledged
        if 0 < frame.number <= last:
            return
        frame.number = last + 1
        self._kept.append(frame)
        self.kept_bytes += frame.nbytes

    def has_room(self, window_bytes: int) -> bool:
        """Return whether another frame may be sent, of any size: fewer than ``window_bytes`` bytes are kept."""
        kept = len(self._kept)
        return not kept or (kept < MAX_KEPT_FRAMES and self.kept_bytes < window_bytes)

    def acknowledge(self, last: Any) -> list[Frame]:
        """Forget the frames up to number ``last``, and return them. Raises BadNumbers."""
        if number(last, "acknowledged") > self.sent:
            raise BadNumbers(f"frame {last} is acknowledged, and {self.sent} were sent")
        if last > self._acknowledged:
            self._acknowledged = last
        forgotten = []
        while self._kept and self._kept[0].number <= self._acknowledged:
            frame = self._kept.popleft()
            self.kept_bytes -= frame.nbytes
            forgotten.append(frame)
        if not self._kept:
            self.kept_bytes = 0
        return forgotten

    def after(self, last: int) -> list[Frame]:
        """Return the frames after number ``last``, oldest first."""
        if not self._kept or last >= self._kept[-1].number:
            return []
        if last + 1 == self._kept[-1].number:  # nearly always
            return [self._kept[-1]]
        return [frame for frame in self._kept if frame.number > last]

    # -- what this end receives

    def finish(self, nbytes: int = 0) -> None:
        """Count a received frame of ``nbytes`` bytes as acted on."""
        self.done += 1
        self._unacknowledged_bytes += nbytes

    @property
    def owes(self) -> bool:
        """Whether there are frames that this end has acted on and not acknowledged."""
        return self.done > self._told

    @property
    def must_acknowledge(self) -> bool:
        """Whether this end has to acknowledge now."""
        return self.done - self._told >= ACKNOWLEDGE_FRAMES or self._unacknowledged_bytes >= ACKNOWLEDGE_BYTES

    def acknowledged_up_to(self, last: int) -> None:
        """Note that this end has acknowledged up to number ``last``."""
        if last > self._told:
            self._told = last
            self._unacknowledged_bytes = 0

    def _resume(self, received: Any, done: Any) -> list[Frame]:
        """Take over how far the other end has come; return the frames to be sent again."""
        number(received, "received")
        if not self._acknowledged <= received <= self.sent:
            raise BadNumbers(
                f"the other end has received {received} frames, and of {self.sent} it has acknowledged "
                f"{self._acknowledged}"
            )
        if number(done, "done") > received:
            raise BadNumbers(f"the other end has acted on {done} frames, and received {received}")
        self.acknowledge(done)
        return self.after(received)


class ClientEnd(SessionEnd):
    """The client's end: opens the session's connections, one after the other."""

    def __init__(self, id: str = "", numbers: Numbers | None = None, kept: list[Frame] | None = None) -> None:
        super().__init__(numbers, kept)
        self.id = id or secrets.token_hex(16)

    def hello(self) -> dict[str, Any]:
        """Begin another connection; return its fields of the hello."""
        self.generation += 1
        return {"session": self.id, "generation": self.generation, "received": self.received}

    def take(self, nbytes: int) -> None:
        """Count a frame of ``nbytes`` bytes that was received and, as answers are at once, acted on."""
        self.received += 1
        self.done = self.received
        self._unacknowledged_bytes += nbytes

    def welcomed(self, welcome: Mapping[str, Any]) -> list[Frame]:
        """Return the frames to be sent again on a connection that the worker welcomes. Raises BadNumbers."""
        again = self._resume(welcome.get("received"), welcome.get("done"))
        self.acknowledged_up_to(self.received)
        return again


class WorkerEnd(SessionEnd):
    """The worker's end: lets the newest connection win."""

    def __init__(self, id: str = "", numbers: Numbers | None = None, kept: list[Frame] | None = None) -> None:
        super().__init__(numbers, kept)
        self.id = id

    def refuse_older(self, generation: Any) -> None:
        """Raise BadNumbers unless ``generation`` is that of a newer connection than any before."""
        if number(generation, "generation") <= self.generation:
            raise BadNumbers(
                f"connection {generation} of this session comes too late, connection {self.generation} was there"
            )

    def resume(self, generation: Any, received: Any) -> dict[str, int]:
        """Let connection ``generation`` win. Return its fields of the welcome; :meth:`after` has what to send again.

        Raises BadNumbers; then the session stays as it was.
        """
        self.refuse_older(generation)
        self._resume(received, received)
        self.generation = generation
        self.acknowledged_up_to(self.done)
        return {"received": self.received, "done": self.done}


def session_id(value: Any) -> str:
    """Return the id of a session. Raises BadNumbers for what is none."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise BadNumbers("a session's id is 32 hexadecimal digits")
    return value


def number(value: Any, name: str) -> int:
    """Return a number from the other end. Raises BadNumbers for what is none."""
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise BadNumbers(f"{name!r} must be a number, and is {value!r:.40}")
    return value
