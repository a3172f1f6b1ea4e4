"""Frames that arrive while an operator runs are read ahead, kept in order, in bounded memory."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.worker import read_ahead  # noqa: E402
from jupyter_gpupool.pytorch.worker.templates import BadRecord  # noqa: E402
from jupyter_gpupool.transport import frames as wire  # noqa: E402

MIB = 1 << 20


class Pair:
    def __init__(self, limit: int) -> None:
        self.client, self.worker = socket.socketpair()
        self.incoming = read_ahead.Incoming(self.worker, limit)
        self.sender = threading.Thread(target=lambda: None)

    def send(self, *frames: tuple[wire.Kind, object, bytes]) -> None:
        """All of them, one after the other, beside the test."""

        def send() -> None:
            with contextlib.suppress(wire.ConnectionLost):  # where a test hangs up
                for kind, header, payload in frames:
                    wire.send(self.client, kind, header, memoryview(payload) if payload else None)

        self.sender = threading.Thread(target=send, daemon=True)
        self.sender.start()

    def take(self) -> tuple[object, bytes]:
        frame = self.incoming.next()
        if frame.payload is None:
            payload = bytearray(frame.length)
            if frame.length:
                self.incoming.read_payload(frame, memoryview(payload))
            return frame.header, bytes(payload)
        return frame.header, frame.payload.numpy().tobytes()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(64 * MIB)
    yield made
    made.incoming.close()
    made.client.close()
    made.worker.close()


def upload(n: int, size: int) -> tuple[wire.Kind, object, bytes]:
    return wire.Kind.UPLOAD, [n], bytes([n % 251]) * size


def test_a_large_copy_travels_while_an_operator_runs(pair: Pair) -> None:
    with pair.incoming.meanwhile():
        pair.send(upload(1, 32 * MIB), upload(2, 5))
        pair.sender.join(300)  # far more than the connection itself holds
        assert not pair.sender.is_alive(), "the client was held up until the operator had ended"
    assert pair.take() == ([1], bytes([1]) * 32 * MIB)
    assert pair.take() == ([2], bytes([2]) * 5)


def test_order_is_kept_however_long_things_take(pair: Pair) -> None:
    chance = random.Random(3)
    sizes = [chance.choice([0, 1, 1000, 300_000]) for _ in range(200)]
    pair.send(*[upload(n, size) for n, size in enumerate(sizes)])
    for n, size in enumerate(sizes):
        assert pair.take() == ([n], bytes([n % 251]) * size)
        if chance.random() < 0.3:
            with pair.incoming.meanwhile():
                threading.Event().wait(chance.choice([0, 0.002, 0.01]))


def test_what_is_too_much_to_keep_waits_in_the_connection(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_MAX_BYTES_AHEAD", 2 * MIB)
    with pair.incoming.meanwhile():
        pair.send(upload(1, MIB), upload(2, 16 * MIB), upload(3, MIB))
        pair.sender.join(0.2)
        assert pair.sender.is_alive()
        assert pair.incoming._held <= 2 * MIB
    assert [pair.take()[0] for _ in range(3)] == [[1], [2], [3]]


def test_what_breaks_the_format_is_told_after_what_came_before(pair: Pair) -> None:
    with pair.incoming.meanwhile():
        pair.send(upload(1, 10), (wire.Kind.UPLOAD, [2], b"x" * (65 * MIB)))
        threading.Event().wait(0.05)
    assert pair.take()[0] == [1]
    with pytest.raises(BadRecord, match="68157440 bytes to a slice of 67108864"):
        pair.take()


def test_after_the_end_of_a_connection_the_next_one_goes_on(pair: Pair) -> None:
    pair.send(upload(1, 10))
    assert pair.take() == ([1], bytes([1]) * 10)
    with pair.incoming.meanwhile():
        pair.client.sendall(wire.pack(wire.Kind.UPLOAD, [2], 10) + b"half")
        pair.client.close()
        threading.Event().wait(0.01)
    pair.client, after = socket.socketpair()
    pair.incoming.attach(after)
    pair.send(upload(2, 10))
    assert pair.take() == ([2], bytes([2]) * 10)
    assert pair.incoming.received == 2
    after.close()


def test_a_session_that_ends_wakes_whoever_waits_for_its_frames(pair: Pair) -> None:
    threading.Timer(0.05, pair.incoming.close).start()
    with pytest.raises(read_ahead.SessionOver):
        pair.incoming.next()
