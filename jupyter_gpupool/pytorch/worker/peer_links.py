"""The connections of a worker to the lease's workers on other GPU servers.

A worker in its sandbox makes no connection. It asks its engine, which passes one in; the lease's secret opens it, as it
does for clients. Where two workers are about to connect to each other, the one whose name comes first does.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jupyter_gpupool.transport import frames, handshake, tls
from jupyter_gpupool.transport.specs import AttachSpec, WorkerSpec

log = logging.getLogger(__name__)

#: The longest header of a frame between workers, in bytes.
MAX_HEADER = 8 << 20
#: The longest name of a worker, in characters, and the most links that a worker has.
MAX_NAME = 200
_MAX_LINKS = 256
#: How long another worker may take to be linked, and how long one that could not be is not tried again, in seconds.
_LINK_TIMEOUT_S = 15.0
_RETRY_S = 60.0

_CONNECTS_ITSELF = "that worker connects by itself"

#: Reads the next bytes of a frame's payload. Raises OSError.
Read = Callable[[memoryview], None]


class Sending:
    """A frame on its way: the memory behind its payload is not to change before it ``is_sent``."""

    def __init__(self, head: bytes, payload: memoryview | None) -> None:
        self.head = head
        self.payload = payload
        self.is_sent = False


class PeerLink:
    """A connection to one other worker. Each end writes in a thread of its own, so that both may send at once.

    ``on_sent`` is called whenever a frame with a payload has been sent.
    """

    def __init__(self, name: str, conn: tls.Connection, on_sent: Callable[[], None]) -> None:
        self.name = name
        self._conn = conn
        self._on_sent = on_sent
        self._waiting: queue.SimpleQueue[Sending | None] = queue.SimpleQueue()
        self.since = time.monotonic()
        #: why it is lost, or empty
        self.lost = ""
        threading.Thread(target=self._write, name="peer", daemon=True).start()

    def send(self, header: list[Any], payload: memoryview | None = None) -> Sending:
        """Send a frame, after those before it; returns at once."""
        nbytes = 0 if payload is None else payload.nbytes
        sending = Sending(frames.pack(frames.Kind.PEER, header, nbytes), payload)
        self._waiting.put(sending)
        return sending

    def read(self, hear: Callable[[PeerLink, list[Any], int, Read], None]) -> str:
        """Call ``hear`` with each frame's header, the length of its payload and what reads it, until the link is lost.

        Returns why it is lost. ``hear`` raises BadRecord for what no worker sends.
        """
        conn = self._conn
        try:
            while True:
                kind, header, length = frames.receive(conn, MAX_HEADER)
                if kind is not frames.Kind.PEER or not isinstance(header, list):
                    raise frames.WireError(f"unexpected {kind.name}")
                hear(self, header, length, lambda view: frames.receive_into(conn, view))
        except OSError as e:
            why = str(e)
        except Exception as e:  # whatever it was, this worker goes on
            why = f"it sent what no worker sends ({type(e).__name__}: {e})"
            log.warning("The link to the lease's worker %s ends: %s", self.name, why)
        return self.close(why)

    def close(self, why: str) -> str:
        """End the link, and return why it is lost: for this reason, or one before it."""
        self.lost = self.lost or why
        with contextlib.suppress(OSError):
            self._conn.shutdown(socket.SHUT_RDWR)
        self._waiting.put(None)
        return self.lost

    def _write(self) -> None:
        try:
            with contextlib.closing(self._conn):  # the reader hears of it
                while (sending := self._waiting.get()) is not None:
                    frames.send_all(self._conn, sending.head)
                    if sending.payload is not None:
                        if sending.payload.nbytes:
                            frames.send_all(self._conn, sending.payload)
                        sending.is_sent = True
                        self._on_sent()
        except OSError as e:
            self.close(str(e))


class PeerLinks:
    """The links of one worker, by the names of the others. ``hear`` and ``on_lost`` are called in a link's own thread.

    ``secret``: the lease's, as a client has presented it.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        secret: Callable[[], str],
        hear: Callable[[PeerLink, list[Any], int, Read], None],
        on_sent: Callable[[], None],
        on_lost: Callable[[PeerLink, str], None],
    ) -> None:
        #: of this worker; one that follows another one takes over its name
        self.name = "" if spec.awaits_state else spec.peer_name or spec.devices[0].uuid
        self._spec = spec
        self._secret = secret
        self._hear = hear
        self._on_sent = on_sent
        self._on_lost = on_lost
        #: asks the engine for a connection to the worker of that name, and returns whether one has heard it
        self.ask: Callable[[str], bool] | None = None
        #: the names of the lease's other workers, as the engine has said them
        self.known: list[str] = []
        self._changed = threading.Condition()
        self._links: dict[str, PeerLink] = {}
        self._asked: set[str] = set()
        #: who is just connecting to this worker, and since when
        self._coming: dict[str, float] = {}
        #: why there is no link, and since when
        self._failures: dict[str, tuple[str, float]] = {}
        #: whether this worker is to follow another one, and has not yet
        self.is_next = spec.awaits_state
        #: the workers that are about to be replaced by others of their names
        self._expected: set[str] = set()
        #: the links to those others, which nobody uses yet
        self._next: dict[str, PeerLink] = {}

    def reach(
        self, names: Collection[str], is_over: Callable[[], bool] = lambda: False
    ) -> dict[str, PeerLink] | str:
        """The links to the workers of these names, once they are there; why not, in one line, if they do not come."""
        deadline = time.monotonic() + _LINK_TIMEOUT_S
        with self._changed:
            while True:
                missing = sorted(name for name in names if name not in self._links)
                if not missing:
                    return {name: self._links[name] for name in names}
                now = time.monotonic()
                for name in missing:
                    why, since = self._failures.get(name, ("", 0.0))
                    if why and now - since < _RETRY_S:
                        return why
                    if now > deadline or is_over():
                        self._fail(name, f"the lease's worker {name} has not connected")
                    elif (
                        name not in self._asked and now - self._coming.get(name, -math.inf) > _LINK_TIMEOUT_S
                    ):
                        self._asked.add(name)
                        self._failures.pop(name, None)
                        if self.ask is None or not self.ask(name):
                            self._fail(name, "the worker's engine connects no workers")
                self._changed.wait(0.5)

    def get(self, name: Any, is_over: Callable[[], bool] = lambda: False) -> PeerLink:
        """The link to the worker of that name. Raises RuntimeError where there is none."""
        found = self.reach([name], is_over)
        if not isinstance(found, str):
            return found[name]
        raise RuntimeError(f"another GPU server of the lease is not connected: {found}")

    def linked(self, is_over: Callable[[], bool] = lambda: False) -> list[str]:
        """The names of the lease's other workers that are linked to this one, after an attempt to link all."""
        self.reach(self.known, is_over)
        with self._changed:
            return sorted(self._links)

    # -- where a worker moves

    def take_over(self, name: str, linked: Collection[str]) -> None:
        """Be the worker of that name from now on, and link to these; see :meth:`missing`."""
        with self._changed:
            self.name = name
            for other in linked:
                if other not in self._links:
                    self._asked.add(other)
        for other in linked:
            if other in self._asked and (self.ask is None or not self.ask(other)):
                self._fail(other, "the worker's engine connects no workers")

    def missing(self, names: Collection[str]) -> list[str]:
        """Those of these workers that are not linked yet. Raises RuntimeError if one cannot be."""
        with self._changed:
            missing = [name for name in names if name not in self._links]
            for name in missing:
                why, _ = self._failures.get(name, ("", 0.0))
                if why:
                    raise RuntimeError(why)
            return missing

    def find(self, name: str) -> PeerLink | None:
        """The link to the worker of that name, if there is one."""
        with self._changed:
            return self._links.get(name)

    def expect(self, name: Any) -> None:
        """Another worker is to take the place of the one of that name: it is linked besides, until it has. Raises
        ValueError."""
        if not self.is_name(name):
            raise ValueError("no name of a worker")
        with self._changed:
            self._expected.add(name)

    def replace(self, is_done: bool) -> list[tuple[PeerLink, PeerLink]]:
        """The other workers have taken those places, or will not. Return each former link with the one that follows."""
        with self._changed:
            came, self._next = self._next, {}
            self._expected.clear()
            pairs = []
            for name, link in came.items():
                before = self._links.get(name)
                if is_done and before is not None and not link.lost:
                    self._links[name] = link
                    pairs.append((before, link))
                else:
                    link.close("the worker did not move")
            return pairs

    def _fail(self, name: str, why: str) -> None:
        with self._changed:
            self._asked.discard(name)
            self._failures[name] = why, time.monotonic()
            self._changed.notify_all()

    def introduce(self, names: Any) -> None:
        """The engine names the lease's other workers. Raises ValueError."""
        if not isinstance(names, list) or len(names) > _MAX_LINKS or not all(map(self.is_name, names)):
            raise ValueError("no names of workers")
        self.known = names

    def obey(self, message: Mapping[str, Any], descriptors: list[int]) -> None:
        """Take the connection that was asked for, or the reason why there is none. Raises ValueError."""
        name = message["peer"]
        if name not in self._asked:
            raise ValueError(f"nobody has asked for the worker {name!r:.80}")
        if not descriptors:
            self._fail(name, str(message.get("failed", "")) or "there is no connection")
            return
        with self._changed:
            if name in self._links:  # that one has connected meanwhile
                self._asked.discard(name)
                return
        host, port = message["to"]
        spec = AttachSpec(
            self._spec.lease_id,
            host,
            port,
            self._secret(),
            (),
            self._spec.ttl_s,
            secure=message["secure"],
        )
        sock = socket.socket(fileno=descriptors.pop())
        threading.Thread(target=self._connect, args=(name, spec, sock), name="peer", daemon=True).start()

    def _connect(self, name: str, spec: AttachSpec, sock: socket.socket) -> None:
        try:
            conn, welcome = handshake.connect(
                spec, "peer", {"peer": self.name, "next": self.is_next}, _LINK_TIMEOUT_S, sock
            )
        except (handshake.Refused, frames.WireError, OSError) as e:
            if isinstance(e, handshake.Refused) and str(e) == _CONNECTS_ITSELF:
                with self._changed:  # and is waited for
                    self._asked.discard(name)
                return
            self._fail(name, f"the lease's worker at {spec.host}:{spec.port} cannot be linked: {e}")
            return
        if welcome.get("peer") != name:
            conn.close()
            self._fail(name, f"the worker at {spec.host}:{spec.port} is another one than {name}")
            return
        self.serve(name, conn)

    def admit(self, name: Any, is_next: bool = False) -> None:
        """Raise Refused where a worker of that name is not to be linked by a connection that it makes now.

        ``is_next``: it is to follow the one of that name, and has not yet.
        """
        with self._changed:
            if not self.is_name(name) or (name not in self._links and len(self._links) >= _MAX_LINKS):
                raise handshake.Refused("this worker is linked to no such other")
            if is_next:
                if name not in self._expected:
                    raise handshake.Refused("no worker is to follow that one")
                return
            known = self._links.get(name)
            # That one may have begun to connect before it had this link.
            is_new = known is not None and time.monotonic() - known.since < _LINK_TIMEOUT_S
            if self.name < name and (name in self._asked or is_new):
                raise handshake.Refused(_CONNECTS_ITSELF)
            if len(self._coming) > _MAX_LINKS:
                self._coming.clear()
            self._coming[name] = time.monotonic()

    def serve(self, name: str, conn: tls.Connection, is_next: bool = False) -> None:
        """Use an authenticated connection until it ends. ``name``: of the worker at the other end."""
        with self._changed:
            if is_next and name not in self._expected:  # any more
                conn.close()
                return
            frames.tune(conn, max(self._spec.ttl_s, self._spec.resume_s))
            links = self._next if is_next else self._links
            before = links.get(name)
            links[name] = link = PeerLink(name, conn, self._on_sent)
            self._coming.pop(name, None)
            self._asked.discard(name)
            self._failures.pop(name, None)
            self._changed.notify_all()
        if before is not None:
            before.close("the worker has connected again")
        why = link.read(self._hear)
        with self._changed:
            for links in (self._links, self._next):
                if links.get(name) is link:
                    del links[name]
        self._on_lost(link, why)

    def is_name(self, name: Any) -> bool:
        """Whether another worker may have that name."""
        return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name != self.name
