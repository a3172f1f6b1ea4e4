"""Copies in pieces: a buffer is used again only when its copy has ended, and nothing waits for more than that."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.worker.device import HostCopy  # noqa: E402
from jupyter_gpupool.pytorch.worker.read_ahead import SessionOver  # noqa: E402
from jupyter_gpupool.pytorch.worker.served_session import ServedSession  # noqa: E402
from jupyter_gpupool.pytorch.worker.staging import Staging  # noqa: E402
from jupyter_gpupool.transport import frames  # noqa: E402


class SlowDevice:
    """Copies only when somebody waits for it, in order, as a stream does: a buffer reused too early is noticed."""

    def __init__(self) -> None:
        self.queue: list[tuple[SlowDevice.Event, Any, Any]] = []
        self.buffers = 0
        self.most = 0
        self.fails_at: int | None = None

    class Event:
        def __init__(self, device: SlowDevice) -> None:
            self.device = device
            self.done = False

        def synchronize(self) -> None:
            while not self.done:
                event, target, source = self.device.queue.pop(0)
                target.copy_(source)
                event.done = True

    def allocate(self, nbytes: int) -> Any:
        self.buffers += 1
        return torch.empty(nbytes, dtype=torch.uint8)

    def push(self, target: Any, source: Any) -> Any:
        assert target.shape == source.shape
        if self.fails_at is not None and not self.fails_at:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.fails_at = self.fails_at and self.fails_at - 1
        event = self.Event(self)
        self.queue.append((event, target, source))
        self.most = max(self.most, len(self.queue))
        return event

    def finish(self) -> None:
        if self.queue:
            self.queue[-1][0].synchronize()

    def staging(self) -> Staging:
        return Staging(self.allocate, self.push, piece_bytes=8, depth=3)


def numbers(n: int) -> Any:
    return torch.arange(n, dtype=torch.int64).to(torch.uint8)


class Sender:
    """A network that delivers the elements of ``data`` into whatever it is given."""

    def __init__(self, data: Any) -> None:
        self.data = bytes(data.numpy())
        self.at = 0

    def __call__(self, view: memoryview) -> None:
        view[:] = self.data[self.at : self.at + len(view)]
        self.at += len(view)


@pytest.mark.parametrize("n", [1, 8, 9, 24, 25, 100])
def test_uploads_arrive_and_overtake_no_buffer(n: int) -> None:
    device, target, send = SlowDevice(), torch.zeros(n, dtype=torch.uint8), Sender(numbers(n))
    device.staging().upload(target, send)
    device.finish()
    assert torch.equal(target, numbers(n))
    assert device.buffers == min(3, -(-n // 8)) == device.most


def test_what_follows_a_failed_copy_is_received_all_the_same() -> None:
    device, send = SlowDevice(), Sender(numbers(100))
    device.fails_at = 2
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.staging().upload(torch.zeros(100, dtype=torch.uint8), send)
    assert send.at == 100


def test_a_broken_connection_is_not_read_any_more() -> None:
    def send(view: memoryview) -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        SlowDevice().staging().upload(torch.zeros(100, dtype=torch.uint8), send)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("n", [1, 8, 9, 24, 25, 100])
def test_downloads_arrive_piece_by_piece(n: int, pinned: bool) -> None:
    device, target = SlowDevice(), torch.zeros(n, dtype=torch.uint8)
    copy = HostCopy(target, device.staging().download(numbers(n), target, pinned))
    arrived = b"".join(bytes(piece) for piece in copy.pieces())  # each is right when it is given out
    assert arrived == bytes(numbers(n).numpy()) == bytes(copy.view)
    if pinned:
        assert device.buffers == 0 and device.most == -(-n // 8), "nothing waits between the pieces"
    else:
        assert device.buffers == device.most == min(3, -(-n // 8))


def test_a_download_can_be_waited_for_as_a_whole() -> None:
    device, target = SlowDevice(), torch.zeros(50, dtype=torch.uint8)
    copy = HostCopy(target, device.staging().download(numbers(50), target, pinned=False))
    assert bytes(copy.wait()) == bytes(numbers(50).numpy()) == bytes(copy.wait())


class TestAnswer:
    """An answer goes out while the rest of it is still on its way from the device."""

    @staticmethod
    def served() -> tuple[Any, socket.socket]:
        ours, theirs = socket.socketpair()
        served = ServedSession("", None, 1 << 20, on_change=lambda: None)
        assert served.attach(ours, 0)
        return served, theirs

    def test_each_piece_is_sent_before_the_next_one_is_waited_for(self) -> None:
        served, theirs = self.served()
        content, read = numbers(100_000), bytearray()

        def arriving() -> Iterator[int]:
            yield 40_000
            kind, header, length = frames.receive(theirs)
            assert (kind, header, length) == (frames.Kind.VALUE, [1, None], 100_000)
            read.extend(theirs.recv(40_000, socket.MSG_WAITALL))
            yield 100_000

        copy = HostCopy(content, arriving())
        copy.start()
        served.answer(None, copy)
        read.extend(theirs.recv(60_000, socket.MSG_WAITALL))
        assert bytes(read) == bytes(content.numpy())
        served.close()

    def test_a_copy_that_fails_halfway_ends_the_session(self) -> None:
        served, theirs = self.served()

        def arriving() -> Iterator[int]:
            yield 40_000
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        copy = HostCopy(numbers(100_000), arriving())
        copy.start()
        with pytest.raises(RuntimeError, match="illegal"):
            served.answer(None, copy)
        read = 0
        while piece := theirs.recv(1 << 20):
            read += len(piece)
        assert 40_000 < read < 41_000
        with pytest.raises(SessionOver):
            served.answer(None, None)
        served.close()
