"""A link with a round trip and a rate, in user space: a process between two ends that delays and paces bytes.

A chunk is due half a round trip after it arrived, and not before the chunks ahead of it have passed at the
link's rate. The link measures how late it forwards each chunk: this is its own error.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import multiprocessing
import select
import socket
import statistics
import time
from typing import Any, NamedTuple

#: Largest number of bytes held per direction: more than any round trip here needs to stay full.
_WINDOW = 64 << 20
_CHUNK = 1 << 18
_PR_SET_TIMERSLACK = 29


class Traffic(NamedTuple):
    """Since the last :meth:`Link.measure`: bytes each way, how often the direction turned towards the
    client, and the link's own lateness in ms."""

    bytes_up: int
    bytes_down: int
    answers: int
    late_ms_p50: float
    late_ms_p95: float


class Link:
    """Forward connections to ``port`` on to ``target``. A context manager."""

    def __init__(self, target: tuple[str, int]) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self._ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_relay, args=(listener, target, theirs), daemon=True
        )
        self._process.start()
        listener.close()
        theirs.close()

    def shape(self, round_trip_ms: float, gbit_per_s: float) -> None:
        """Set delay and rate from now on; a rate of 0 means no limit."""
        self._ask({"round_trip_s": round_trip_ms / 1e3, "bytes_per_s": gbit_per_s * 1e9 / 8})

    def measure(self) -> Traffic:
        """Return what passed since the last call."""
        return Traffic(**self._ask({}))

    def _ask(self, what: dict[str, float]) -> dict[str, Any]:
        self._ours.send_bytes(json.dumps(what).encode())
        return json.loads(self._ours.recv_bytes())

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()


class _Way:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.held: collections.deque[tuple[float, memoryview]] = collections.deque()
        self.bytes_held = 0
        self.free_at = 0.0
        self.ended = False


class _Relay:
    def __init__(self) -> None:
        self.round_trip_s = 0.0
        self.bytes_per_s = 0.0
        self.ways: list[_Way] = []
        self.reset()

    def reset(self) -> None:
        self.passed = [0, 0]
        self.answers = 0
        self.late: list[float] = []
        self._last = 0

    def connect(self, near: socket.socket, far: socket.socket) -> None:
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ways += [_Way(near, far), _Way(far, near)]

    def readers(self) -> list[socket.socket]:
        return [w.source for w in self.ways if not w.ended and w.bytes_held < _WINDOW]

    def take(self, way: _Way, now: float) -> None:
        try:
            data = way.source.recv(_CHUNK)
        except (BlockingIOError, ConnectionError):
            return
        if not data:
            way.ended = True
            return
        if self.bytes_per_s:
            way.free_at = max(way.free_at, now) + len(data) / self.bytes_per_s
        due = (way.free_at if self.bytes_per_s else now) + self.round_trip_s / 2
        way.held.append((due, memoryview(data)))
        way.bytes_held += len(data)
        direction = self.ways.index(way) % 2
        self.passed[direction] += len(data)
        if direction != self._last:
            self._last = direction
            self.answers += direction

    def give(self, way: _Way) -> None:
        while way.held and way.held[0][0] <= time.perf_counter():
            due, data = way.held[0]
            try:
                sent = way.target.send(data)
            except BlockingIOError:
                return
            except OSError:
                way.held.clear()
                way.ended = True
                return
            way.bytes_held -= sent
            if sent < len(data):
                way.held[0] = (due, data[sent:])
                return
            way.held.popleft()
            self.late.append(time.perf_counter() - due)
        if way.ended and not way.held:
            with contextlib.suppress(OSError):
                way.target.shutdown(socket.SHUT_WR)


def _relay(listener: socket.socket, target: tuple[str, int], control: Any) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # wake within 1 µs, not 50
    relay = _Relay()
    while True:
        blocked = [w for w in relay.ways if w.held and w.held[0][0] <= time.perf_counter()]
        due = min((w.held[0][0] for w in relay.ways if w.held and w not in blocked), default=None)
        timeout = None if due is None else max(0.0, due - time.perf_counter())
        reading, _, _ = select.select(
            [listener, control, *relay.readers()], [w.target for w in blocked], [], timeout
        )
        now = time.perf_counter()
        if listener in reading:
            relay.connect(listener.accept()[0], socket.create_connection(target))
        if control in reading:
            try:
                _answer(relay, control)
            except EOFError:
                return
        for way in relay.ways:
            if way.source in reading:
                relay.take(way, now)
            relay.give(way)


def _answer(relay: _Relay, control: Any) -> None:
    wanted = json.loads(control.recv_bytes())
    if wanted:
        relay.round_trip_s, relay.bytes_per_s = wanted["round_trip_s"], wanted["bytes_per_s"]
        control.send_bytes(b"{}")
        return
    late = sorted(relay.late) or [0.0]
    traffic = Traffic(
        relay.passed[0],
        relay.passed[1],
        relay.answers,
        round(statistics.median(late) * 1e3, 3),
        round(late[int(0.95 * (len(late) - 1))] * 1e3, 3),
    )
    relay.reset()
    control.send_bytes(json.dumps(traffic._asdict()).encode())
