"""The connection between two workers of a lease: who may make it, and what crosses the network."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.worker.peer_links import PeerLinks  # noqa: E402
from jupyter_gpupool.transport import frames, handshake  # noqa: E402
from jupyter_gpupool.transport.specs import DeviceSpec, WorkerSpec  # noqa: E402

from ...support.certificates import Certificates  # noqa: E402

PATTERN = b"what the eavesdropper looks for!"


class Eavesdropper:
    """Forwards connections to a port, and keeps what crosses it. ``impersonates``: answers in its place instead."""

    def __init__(self, port: int, impersonates: Certificates | None = None) -> None:
        self._port = port
        self._impersonates = impersonates
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heard = bytearray()
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                if self._impersonates is not None:
                    threading.Thread(target=self._answer, args=(sock,), daemon=True).start()
                    continue
                other = socket.create_connection(("127.0.0.1", self._port))
                for here, there in ((sock, other), (other, sock)):
                    threading.Thread(target=self._forward, args=(here, there), daemon=True).start()

    def _forward(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := here.recv(65536):
                self.heard += piece
                there.sendall(piece)
            there.shutdown(socket.SHUT_WR)

    def _answer(self, sock: socket.socket) -> None:
        from jupyter_gpupool.transport import tls

        assert self._impersonates is not None
        own = tls.OwnCertificate(str(self._impersonates.certfile), str(self._impersonates.keyfile))
        own.context.set_alpn_protocols([tls.protocol_of("lease-of-a-test")])
        with contextlib.suppress(OSError), own.context.wrap_socket(sock, server_side=True) as conn:
            self.heard += conn.recv(65536)
            frames.send(conn, frames.Kind.WELCOME, {"peer": "GPU-0", "proof": b"p" * 32})
            while piece := conn.recv(65536):
                self.heard += piece

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def between() -> Iterator[Callable[..., Callable[[int], int]]]:
    """What stands in the place of a worker's port; the one that was made last is its attribute ``one``."""
    made: list[Eavesdropper] = []

    def put(**options: Any) -> Callable[[int], int]:
        def way(port: int) -> int:
            made.append(Eavesdropper(port, **options))
            return made[-1].port

        return way

    put.made = made  # type: ignore[attr-defined]
    yield put
    for one in made:
        one.close()


def copied(spec: Any) -> bytes:
    """What arrives of the pattern, a thousand times, at the other server."""
    local = torch.frombuffer(bytearray(PATTERN * 1000), dtype=torch.uint8)
    session.activate(spec)
    try:
        return bytes(local.to("cuda:0").to("cuda:1").cpu().numpy())
    finally:
        session.deactivate()


def test_who_listens_between_two_servers_hears_nothing(linked: Callable, between: Any) -> None:
    lease = linked(1, 1, ways={0: between(), 1: between()})
    assert copied(lease.spec) == PATTERN * 1000
    heard = b"".join(bytes(one.heard) for one in between.made)
    assert len(heard) > 32_000
    assert PATTERN not in heard and lease.spec.secret.encode() not in heard


def test_who_stands_between_two_servers_learns_no_secret_and_gets_no_tensor(
    linked: Callable, between: Any, tmp_path: Any
) -> None:
    forged = between(impersonates=Certificates(tmp_path))
    lease = linked(1, 1, ways={0: forged, 1: forged})
    assert copied(lease.spec) == PATTERN * 1000, "it passes this process then"
    assert sum(one.connections for one in between.made) > 0
    for one in between.made:
        assert PATTERN not in one.heard and lease.spec.secret.encode() not in one.heard


def test_only_who_has_the_secret_is_a_peer(linked: Callable) -> None:
    lease = linked(1, 1)
    one = lease.workers[0].spec
    with pytest.raises(handshake.Refused, match="the secret is not this lease's"):
        handshake.connect(dataclasses.replace(one, secret="guessed"), "peer", {"peer": "GPU-1"})
    for name in (None, "", 7, "x" * 201, "GPU-0"):
        with pytest.raises(handshake.Refused, match="linked to no such other"):
            handshake.connect(one, "peer", {"peer": name})
    conn, welcome = handshake.connect(one, "peer", {"peer": "GPU-1"})
    conn.close()
    assert welcome["peer"] == "GPU-0"
    assert copied(lease.spec) == PATTERN * 1000


class Network:
    """Workers without devices that connect to each other.

    ``delays_s``: how long it takes until a worker gets each connection that it asks for; ``slow_s``: until it reads
    what another one says on each.
    """

    def __init__(self, names: str, delays_s: dict[str, list[float]], slow_s: dict[str, list[float]]) -> None:
        self._delays_s = delays_s
        self._slow_s = slow_s
        self.timers: list[threading.Timer] = []
        self.workers = {name: self._worker(name) for name in names}
        self.lost: list[str] = []

    def _worker(self, name: str) -> PeerLinks:
        devices = (DeviceSpec(0, name, "emulated", 64, 64, True),)
        spec = WorkerSpec("lease", hashlib.sha256(b"secret").hexdigest(), devices)
        links = PeerLinks(
            spec, lambda: "secret", lambda *frame: None, lambda: None, lambda link, why: self.lost.append(why)
        )

        def ask(other: str) -> bool:
            delay_s = self._delays_s[name].pop(0) if self._delays_s.get(name) else 0.0
            self.timers.append(
                threading.Timer(delay_s, self._connect, args=(links, self.workers[other], spec))
            )
            self.timers[-1].start()
            return True

        links.ask = ask
        return links

    def _connect(self, links: PeerLinks, other: PeerLinks, spec: WorkerSpec) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        listener.close()
        slow_s = self._slow_s[other.name].pop(0) if self._slow_s.get(other.name) else 0.0
        self.timers.append(threading.Timer(slow_s, self._accept, args=(other, theirs, spec)))
        self.timers[-1].start()
        with contextlib.suppress(ValueError):
            message = {"peer": other.name, "to": ["127.0.0.1", 1], "secure": False, "ca": ""}
            links.obey(message, [ours.fileno()])
            ours.detach()

    def settle(self) -> None:
        """Wait until every connection is a link, or refused."""
        for timer in self.timers:
            timer.join()

    def _accept(self, links: PeerLinks, sock: socket.socket, spec: WorkerSpec) -> None:
        def let_in(hello: dict[str, Any]) -> dict[str, Any]:
            links.admit(hello["peer"])
            return {"peer": links.name}

        with contextlib.suppress(OSError, handshake.Refused, frames.WireError):
            hello = handshake.admit(sock, spec, {}, resume=let_in)
            threading.Thread(target=links.serve, args=(hello["peer"], sock), daemon=True).start()


@pytest.mark.parametrize(
    ("delays_s", "slow_s"),
    [
        ({}, {}),
        ({"a": [0.3]}, {}),
        ({"b": [0.3]}, {}),
        ({}, {"a": [0.5]}),
        ({}, {"b": [0.5]}),
        ({"a": [0.2]}, {"a": [0.5]}),
        ({"b": [0.2]}, {"b": [0.5]}),
    ],
    ids=str,
)
def test_two_workers_that_connect_to_each_other_at_once_keep_one_link(
    delays_s: dict[str, list[float]], slow_s: dict[str, list[float]]
) -> None:
    network = Network("ab", delays_s, slow_s)
    found: dict[str, Any] = {}

    def reach(name: str, other: str) -> None:
        found[name] = network.workers[name].reach([other])

    threads = [threading.Thread(target=reach, args=pair) for pair in ("ab", "ba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(found["a"], dict) and isinstance(found["b"], dict), found
    for links in found.values():
        for link in links.values():
            assert not link.lost
    network.settle()
    assert network.workers["a"].reach("b") == found["a"]
    assert network.workers["b"].reach("a") == found["b"]
    assert network.lost == []
    for links in found.values():
        for link in links.values():
            link.close("the test is over")
