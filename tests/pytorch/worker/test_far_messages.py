"""Tensors that wait at one worker until a rank at another one asks for them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.protocol.commands import FETCH, IS_THERE, POST  # noqa: E402
from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice  # noqa: E402
from jupyter_gpupool.pytorch.worker.far_messages import FarMessages  # noqa: E402
from jupyter_gpupool.pytorch.worker.messages import Messages  # noqa: E402
from jupyter_gpupool.pytorch.worker.peer_links import PeerLink  # noqa: E402
from jupyter_gpupool.pytorch.worker.shared_storages import SharedStorages  # noqa: E402
from jupyter_gpupool.transport import frames  # noqa: E402
from jupyter_gpupool.transport.specs import DeviceSpec  # noqa: E402

from .test_messages import BOX, FOUR, NAME, Rank  # noqa: E402

PATIENCE_S = 300.0


class Server:
    """A worker with one rank, and its link to another one."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self.device = EmulatedDevice(DeviceSpec(0, name, "emulated", 64, 64, True))
        shared = SharedStorages()
        self.messages = Messages(shared)
        self.far = FarMessages(self.messages, shared)
        self.link = PeerLink("the other", sock, lambda: None)
        self.lost = ""
        self._reads = threading.Thread(target=self._read)
        self._reads.start()
        self.rank = Rank(self.device, shared, self.messages, links=self, far=self.far)

    def _read(self) -> None:
        self.lost = self.link.read(self.far.hear)
        self.far.lose(self.link)

    # -- as PeerLinks

    def is_name(self, name: Any) -> bool:
        return name == "the other"

    def get(self, name: Any, is_over: Any = None) -> PeerLink:
        return self.link

    def linked(self, is_over: Any = None) -> list[str]:
        return ["the other"]

    def fetch(self, timeout_s: float = PATIENCE_S, layout: Any = FOUR) -> None:
        self.rank.session.run([FETCH, "the other", BOX, NAME, 1, layout, [0, 1], timeout_s])

    def is_there(self) -> Any:
        self.rank.session.run([IS_THERE, "the other", BOX, NAME])
        return self.rank.answers.pop()

    def close(self) -> None:
        self.link.close("the test is over")
        self._reads.join()


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    one, two = (Server(name, sock) for name, sock in zip("ab", socket.socketpair()))
    yield one, two
    for server in (one, two):
        server.close()


def test_a_tensor_is_fetched_and_takes_no_memory_where_it_was(servers: tuple[Server, Server]) -> None:
    source, target = servers
    before = source.device.allocated
    source.rank.write(1, 2, 3, 4)
    source.rank.post()
    assert source.device.allocated > before
    assert target.is_there() is True
    target.fetch()
    assert target.rank.values() == [1, 2, 3, 4]
    assert source.device.allocated == before
    assert target.is_there() is False
    assert target.rank.complaints == source.rank.complaints == []


def test_who_asks_first_waits_for_it(servers: tuple[Server, Server]) -> None:
    source, target = servers
    waiting = threading.Thread(target=target.fetch)
    waiting.start()
    source.rank.write(5, 6, 7, 8)
    source.rank.post()
    waiting.join()
    assert target.rank.values() == [5, 6, 7, 8]


def test_a_rank_that_ends_is_named(servers: tuple[Server, Server]) -> None:
    source, target = servers
    source.rank.session.run([POST, BOX, b"m" * 16, 1, FOUR])  # its box is known from here on
    waiting = threading.Thread(target=target.fetch)
    waiting.start()
    source.rank.session.close()
    waiting.join()
    assert "rank 0 has ended or left the lease" in target.rank.hears()


def test_what_does_not_fit_does_not_come_or_is_lost_is_said(servers: tuple[Server, Server]) -> None:
    source, target = servers
    target.fetch(0.1)
    assert "rank 1 waited 0.1 s in recv for rank 0" in target.rank.hears()
    assert target.is_there() is False, "and by now the other worker knows that nobody waits"
    source.rank.write(1, 2, 3, 4)
    source.rank.post()
    target.fetch(layout=[[2], [1], 0, "float32", 0])
    assert "sends 4 elements of torch.float32 to a tensor of 2" in target.rank.hears()
    source.link.close("its machine has gone")
    target.fetch()
    assert "the connection to the GPU server of rank 0 is lost" in target.rank.hears()
    assert target.is_there() is True, "who receives it hears of it at once"


def pack(header: Any, payload: bytes = b"") -> bytes:
    return frames.pack(frames.Kind.PEER, header, len(payload)) + payload


BAD = {
    "no number": [16, "one", BOX, NAME, [0, 1], "float32", 4],
    "no name": [16, 1, BOX, 7, [0, 1], "float32", 4],
    "no ranks": [16, 1, BOX, NAME, 7, "float32", 4],
    "ranks that are none": [16, 1, BOX, NAME, ["0", "1"], "float32", 4],
    "no type": [16, 1, BOX, NAME, [0, 1], "load", 4],
    "no length": [16, 1, BOX, NAME, [0, 1], "float32", 4.0],
    "too few fields": [16, 1, BOX],
    "a refusal without a reason": [18, 1, 7],
    "a question for nothing": [19, 1, BOX],
    "an answer that is none": [20, 1, 7],
    "another kind": [22, 1],
    "an end of too much": [21, 1, 2],
    "not even that": [16],
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_worker_sends_ends_the_link_with_one_line(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    server = Server("a", ours)
    theirs.sendall(pack(BAD[name]))
    with theirs, contextlib.suppress(OSError):
        while theirs.recv(4096):
            pass
    server.close()
    assert server.lost.startswith("it sent what no worker sends (")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    server.rank.write(1, 1, 1, 1)
    assert server.rank.values() == [1, 1, 1, 1]


@pytest.mark.parametrize("length", [0, 12, 20], ids=str)
def test_elements_that_are_too_few_or_too_many_end_the_link(length: int) -> None:
    ours, theirs = socket.socketpair()
    server = Server("a", ours)
    waiting = threading.Thread(target=server.fetch)
    waiting.start()
    token = frames.receive(theirs)[1][1]
    theirs.sendall(pack([17, token + 1], bytes(length)))  # nobody waits for that
    theirs.sendall(pack([17, token], bytes(length)))
    waiting.join()
    assert f"{length} bytes in place of 4 elements of torch.float32" in server.rank.hears()
    theirs.close()
    server.close()
