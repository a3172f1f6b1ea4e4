"""Frames are read whole and in order, however their bytes arrive."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupyter_gpupool.transport import frame_reader, frames
from jupyter_gpupool.transport.frame_reader import FrameReader
from jupyter_gpupool.transport.timed_socket import TimedSocket

from ..conftest import often

KINDS = st.sampled_from(list(frames.Kind))
#: around the size of the buffer too, which the tests make small
SIZES = st.integers(0, 40) | st.integers(240, 270) | st.integers(500, 2000)


class Pieces:
    """A connection on which bytes arrive in pieces of the given sizes, over and over."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes, self._calls = memoryview(data), sizes, 0

    def recv_into(self, view: memoryview) -> int:
        n = min(self._sizes[self._calls % len(self._sizes)], len(view), len(self._data))
        self._calls += 1
        view[:n], self._data = self._data[:n], self._data[n:]
        return n


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_reader, "BUFFER_BYTES", 256)


@pytest.mark.soak
@settings(max_examples=often(300, 30_000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(KINDS, SIZES, SIZES, st.integers(0, 2000)), max_size=12),
    st.lists(SIZES.filter(bool), min_size=1),
)
def test_frames_arrive_whole_in_pieces_of_any_size(
    sent: list[tuple[frames.Kind, int, int, int]], sizes: list[int]
) -> None:
    stream = b"".join(
        frames.pack(kind, "h" * header, payload) + bytes(k % 251 for k in range(payload))
        for kind, header, payload, _ in sent
    )
    reader = FrameReader(Pieces(stream, sizes))  # type: ignore[arg-type]
    for kind, header, payload, unwanted in sent:
        found = reader.receive()
        assert found[:3] == (kind, "h" * header, payload)
        unwanted = min(unwanted, payload)
        reader.discard(unwanted)
        got = bytearray(payload - unwanted)
        reader.receive_into(memoryview(got))
        assert got == bytes(k % 251 for k in range(unwanted, payload))
    with pytest.raises(frames.ConnectionClosed):
        reader.receive()


@pytest.mark.soak
@settings(max_examples=often(300, 30_000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=600), st.lists(SIZES.filter(bool), min_size=1))
def test_what_is_no_frame_ends_in_an_error_of_the_wire(data: bytes, sizes: list[int]) -> None:
    reader = FrameReader(Pieces(data, sizes))  # type: ignore[arg-type]
    with pytest.raises((frames.WireError, frames.ConnectionClosed)):
        while True:
            reader.discard(reader.receive(max_header=300)[2])


def test_a_header_that_is_too_long_is_refused_before_it_is_read() -> None:
    reader = FrameReader(Pieces(frames.PREFIX.pack(frames.Kind.PING, 301, 0), [100]))  # type: ignore[arg-type]
    with pytest.raises(frames.WireError, match="a header of 301 bytes is longer than 300 allow"):
        reader.receive(max_header=300)


@contextlib.contextmanager
def connection(timeout_s: float | None) -> Iterator[tuple[TimedSocket, socket.socket]]:
    near, far = socket.socketpair()
    near.settimeout(timeout_s)
    with TimedSocket(near) as ours, far:
        yield ours, far


def test_a_call_that_waits_for_too_long_ends() -> None:
    with connection(0.01) as (ours, _):
        with pytest.raises(TimeoutError):
            ours.recv_into(bytearray(1))
        with pytest.raises(TimeoutError):
            while True:
                ours.send(bytes(1 << 16))


def test_a_call_waits_for_the_other_end() -> None:
    with connection(None) as (ours, far):
        data = bytes(range(256)) * (1 << 14)
        sender = threading.Thread(target=frames.send_all, args=(ours, data))
        sender.start()  # it cannot send all of it before somebody reads
        got = bytearray(len(data))
        frames.receive_into(far, memoryview(got))
        sender.join()
        assert got == data

        received = bytearray(1)
        reader = threading.Thread(target=frames.receive_into, args=(ours, memoryview(received)))
        reader.start()
        far.send(b"x")
        reader.join()
        assert received == b"x"


def test_a_call_that_waits_ends_with_its_connection() -> None:
    with connection(None) as (ours, _):
        failures: list[Exception] = []

        def read() -> None:
            try:
                frames.receive_into(ours, memoryview(bytearray(1)))
            except OSError as e:
                failures.append(e)

        reader = threading.Thread(target=read)
        reader.start()
        ours.shutdown(socket.SHUT_RDWR)
        reader.join()
        assert isinstance(failures[0], frames.ConnectionClosed)
