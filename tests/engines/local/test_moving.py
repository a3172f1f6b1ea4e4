"""A lease moves from the worker of one server to the worker of another, and its program does not notice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.core.environment import LEASE  # noqa: E402
from jupyter_gpupool.core.errors import EngineError  # noqa: E402
from jupyter_gpupool.core.files import write_atomically  # noqa: E402
from jupyter_gpupool.core.models import Lease, WorkerAddress  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport import frames, handshake, tls  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402
from jupyter_gpupool.transport.specs import AttachSpec  # noqa: E402

from ...conftest import often  # noqa: E402
from ...support.certificates import Certificates  # noqa: E402
from ...support.interceptor import Interceptor  # noqa: E402
from .test_engine import attach_spec, granted  # noqa: E402
from .test_parking import Server, elsewhere, training, trains_alike_beside  # noqa: E402


class Pair:
    """Two GPU servers, and a lease that one of them has. ``file``: that of the lease."""

    def __init__(self, servers: list[Server], lease: Lease, file: Path, secure: bool = False) -> None:
        self._file = file
        self.servers = servers
        self.lease = lease
        self.at = 0
        self.moves = 0
        self.worker: WorkerAddress = servers[0].start(lease)
        self._secure = secure
        self._write()

    @property
    def spec(self) -> AttachSpec:
        """The lease as its pool knows it."""
        return replace(attach_spec(self.lease, self.worker), secure=self._secure)

    def _write(self) -> None:
        """What a holder does once its pool knows where the lease is."""
        write_atomically(self._file, self.spec.to_json())

    @property
    def here(self) -> Server:
        return self.servers[self.at]

    @property
    def there(self) -> Server:
        return self.servers[1 - self.at]

    def receive(self) -> WorkerAddress:
        lease = elsewhere(self.lease, f"GPU-{self.moves % 3}")
        worker: WorkerAddress = self.there.do(self.there.engine.receive_worker(lease))
        return worker

    def send(self, to: WorkerAddress) -> Any:
        return self.here.do(self.here.engine.moving.send(self.lease.id, to))

    def move(self) -> None:
        """To the other server."""
        to = self.receive()
        try:
            self.send(to)
            self.there.do(self.there.engine.moving.serve(self.lease.id))
        except EngineError:
            self.there.do(self.there.engine.stop_worker(self.lease.id))
            with contextlib.suppress(EngineError):
                self.here.do(self.here.engine.moving.stay(self.lease.id))
            raise
        self.here.do(self.here.engine.moving.leave(self.lease.id, to))
        self.at, self.worker = 1 - self.at, to
        self.moves += 1
        self._write()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    servers = [
        Server(tmp_path_factory.mktemp(f"server{k}") / "run", park_memory_mib=64, clean_after_s=0.0)
        for k in range(2)
    ]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LEASE, str(tmp_path / "lease.json"))
    return tmp_path / "lease.json"


@pytest.fixture
def pair(servers: list[Server], file: Path) -> Iterator[Pair]:
    """A lease of 100 MiB that this process is attached to."""
    pair = Pair(servers, granted(memory_mib=100), file)
    line = Lifeline(pair.spec, locate=lambda: pair.spec)
    session.activate(pair.spec)
    yield pair
    session.deactivate()
    line.release()
    for server in servers:
        server.do(server.engine.stop_worker(pair.lease.id))
        server.ended.clear()


def connected_to(line: Lifeline) -> int:
    """The port at the other end of a holder's connection; 0 while there is none."""
    try:
        return int(line._lines[0]._sock.getpeername()[1])
    except OSError:
        return 0


def counted(start: int = 0) -> Any:
    """A tensor with numbers that no other memory has by chance."""
    return (torch.arange(1000.0) + start).cuda()


def test_memory_is_sent_before_the_program_rests(pair: Pair) -> None:
    weights = torch.ones(15 << 20).cuda()
    assert weights[-1].item() == 1.0
    to = pair.receive()
    assert pair.send(to).ahead >= 60 << 20
    pair.there.do(pair.there.engine.stop_worker(pair.lease.id))
    pair.here.do(pair.here.engine.moving.stay(pair.lease.id))
    weights[-1] = 2.0
    pair.move()
    assert weights.sum().item() == weights.numel() + 1, (
        "what the first attempt has sent was not taken for true"
    )


@pytest.mark.soak
def test_a_program_gets_the_same_numbers_while_it_is_moved_all_the_time(
    pair: Pair, eventually: Callable[..., Any]
) -> None:
    steps = often(10, 300)
    undisturbed = training(steps)
    over, refused = threading.Event(), []

    def move_about() -> None:
        while not over.is_set():
            try:
                pair.move()
            except EngineError as e:
                refused.append(str(e))

    def until_moved_again() -> None:
        before = pair.moves
        eventually(lambda: pair.moves > before, "another move")

    trains_alike_beside(move_about, over, until_moved_again, undisturbed)
    assert pair.moves >= steps
    assert not refused
    assert not pair.servers[0].ended and not pair.servers[1].ended, "no worker's end is a lease's"


def test_a_parked_lease_moves_and_runs(pair: Pair) -> None:
    x, y = counted(), counted(7)
    alias = x.view(10, 100)
    pair.here.do(pair.here.engine.park_worker(pair.lease))
    pair.move()
    x += 1
    assert torch.equal(alias.cpu().flatten(), torch.arange(1000.0) + 1)
    assert torch.equal(y.cpu(), torch.arange(1000.0) + 7)
    assert not pair.servers[0].engine.parked()


def test_a_move_that_fails_leaves_the_lease_where_it_was(pair: Pair) -> None:
    x = counted()
    to = pair.receive()
    pair.send(to)
    os.kill(to.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="has ended|no worker here|cannot be asked"):
        pair.there.do(pair.there.engine.moving.serve(pair.lease.id))
    pair.there.do(pair.there.engine.stop_worker(pair.lease.id))  # as an engine does, which waits for its end
    with pytest.raises(EngineError, match="about to move"):
        pair.here.do(pair.here.engine.park_worker(pair.lease))
    pair.here.do(pair.here.engine.moving.stay(pair.lease.id))
    assert torch.equal((x * 2).cpu(), torch.arange(1000.0) * 2)
    with pytest.raises(EngineError, match="cannot be reached"):
        pair.send(to)
    assert torch.equal((x * 3).cpu(), torch.arange(1000.0) * 3)
    pair.move()
    assert torch.equal((x * 4).cpu(), torch.arange(1000.0) * 4)


def test_clients_that_hear_nothing_of_a_move_find_their_lease(
    servers: list[Server], file: Path, eventually: Callable[..., Any]
) -> None:
    pair = Pair(servers, granted(memory_mib=100), file)
    line = Lifeline(pair.spec, locate=lambda: pair.spec)
    session.activate(pair.spec)
    try:
        x = counted()
        to = pair.receive()
        pair.send(to)
        pair.there.do(pair.there.engine.moving.serve(pair.lease.id))
        pair.here.engine._workers.leaving.add(pair.lease.id)
        os.kill(pair.worker.pid, signal.SIGKILL)
        pair.worker = to
        pair._write()
        assert torch.equal((x * 2).cpu(), torch.arange(1000.0) * 2)
        eventually(lambda: connected_to(line) == to.port, "the holder follows")
        session.deactivate()
        line.release()
        eventually(lambda: pair.there.ended == [pair.lease.id], "the lease ends with its holder, as ever")
    finally:
        pair.here.engine._workers.leaving.clear()
        pair.there.ended.clear()
        session.deactivate()
        line.release()


def test_who_does_not_follow_keeps_the_lease_where_it_is(pair: Pair) -> None:
    x = counted()
    older = {"follows": False, "torch": torch.__version__, "session": uuid.uuid4().hex}
    conn, _ = handshake.connect(pair.spec, "session", {**older, "generation": 1, "received": 0, "new": True})
    with contextlib.closing(conn):
        with pytest.raises(EngineError, match="earlier version, which does not follow"):
            pair.move()
        assert torch.equal((x * 2).cpu(), torch.arange(1000.0) * 2)


def test_a_worker_that_waits_for_a_lease_takes_no_other_state(pair: Pair) -> None:
    x = counted()
    to = pair.receive()
    spec = attach_spec(pair.lease, to)
    with pytest.raises(handshake.Refused, match="secret"):
        handshake.connect(replace(spec, secret="guessed"), "worker", {})
    conn, _ = handshake.connect(spec, "worker", {})
    with contextlib.closing(conn):
        assert frames.receive(conn)[1] == {"failed": ""}
        conn.sendall(b"no state at all" * 100)
        kind, answer, _ = frames.receive(conn)
        assert kind is frames.Kind.STATE and "no state of a worker" in answer["failed"]
    with pytest.raises(EngineError, match="arrived whole"):
        pair.there.do(pair.there.engine.moving.serve(pair.lease.id))
    with pytest.raises(EngineError, match="waits for no state"):
        pair.send(to)
    pair.there.do(pair.there.engine.stop_worker(pair.lease.id))
    conn, _ = handshake.connect(pair.spec, "worker", {})
    with contextlib.closing(conn):
        _, answer, _ = frames.receive(conn)
        assert answer["failed"] == "it waits for no state", "one that serves takes none either"
    assert torch.equal((x * 2).cpu(), torch.arange(1000.0) * 2)


def test_a_farm_with_certificates(tmp_path: Path, file: Path) -> None:
    certfile = str(Certificates(tmp_path).certfile)
    servers = [Server(tmp_path / f"run{k}", certfile=certfile) for k in range(2)]
    try:
        pair = Pair(servers, granted(memory_mib=100), file, secure=True)
        line = Lifeline(pair.spec, locate=lambda: pair.spec)
        session.activate(pair.spec)
        x = counted()
        to = pair.receive()
        with (
            Interceptor((to.host, to.port), tls.offered_for(pair.lease.id)) as between,
            pytest.raises(EngineError, match="somebody between"),
        ):
            pair.send(replace(to, port=between.port))
        pair.there.do(pair.there.engine.stop_worker(pair.lease.id))
        for k in range(2, 5):
            pair.move()
            assert torch.equal((x * k).cpu(), torch.arange(1000.0) * k)
        session.deactivate()
        line.release()
    finally:
        session.deactivate()
        for server in servers:
            server.stop()


class Trouble:
    """Moves a lease about, and lets connections break and workers die at random moments meanwhile."""

    def __init__(self, pair: Pair, line: Lifeline, seed: int) -> None:
        self.pair = pair
        self.line = line
        self.rng = random.Random(seed)
        self.over = threading.Event()
        #: how often each of them has happened
        self.done: Counter[str] = Counter()
        #: what has failed without a reason
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self.over.is_set():
            what = self.rng.choice(
                [self.move, self.new_worker_dies, self.old_worker_dies, self.park, self.cut]
            )
            try:
                what()
            except EngineError as e:
                self.wrong.append(f"{what.__name__}: {e}")
            else:
                self.done[what.__name__] += 1

    def move(self) -> None:
        self.pair.move()

    def new_worker_dies(self) -> None:
        """Before anybody was sent there: the lease goes on where it is."""
        pair = self.pair
        to = pair.receive()
        killer = threading.Timer(self.rng.random() * 0.05, os.kill, (to.pid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(EngineError):
            pair.send(to)
        killer.join()
        pair.there.do(pair.there.engine.stop_worker(pair.lease.id))
        pair.here.do(pair.here.engine.moving.stay(pair.lease.id))

    def old_worker_dies(self) -> None:
        """Once the other one has everything: the lease goes on there, and clients ask where it is."""
        pair = self.pair
        to = pair.receive()
        pair.send(to)
        pair.there.do(pair.there.engine.moving.serve(pair.lease.id))
        pair.here.engine._workers.leaving.add(pair.lease.id)
        gone = pair.here.engine._workers.gone(pair.lease.id)
        os.kill(pair.worker.pid, signal.SIGKILL)
        pair.here.do(gone.wait())
        pair.here.engine._workers.leaving.discard(pair.lease.id)
        pair.at, pair.worker = 1 - pair.at, to
        pair._write()

    def park(self) -> None:
        """And move it asleep, or wake it where it is."""
        pair = self.pair
        pair.here.do(pair.here.engine.park_worker(pair.lease))
        if self.rng.random() < 0.5:
            pair.move()
        else:
            pair.here.do(pair.here.engine.resume_worker(elsewhere(pair.lease, "GPU-x")))

    def cut(self) -> None:
        sock = self.rng.choice(
            [session.attachment.current().streams()[0].connection._sock, self.line._lines[0]._sock]
        )
        if sock is not None:
            with contextlib.suppress(OSError):  # it is lost already
                sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.soak
def test_moves_parks_cuts_and_deaths_together(
    servers: list[Server], file: Path, eventually: Callable[..., Any]
) -> None:
    pair = Pair(servers, granted(memory_mib=100), file)
    line = Lifeline(pair.spec, locate=lambda: pair.spec)
    session.activate(pair.spec)
    steps = often(8, 300)
    undisturbed = training(steps)
    trouble = Trouble(pair, line, seed=steps)

    def until_something_has_happened() -> None:
        before = sum(trouble.done.values())
        eventually(lambda: sum(trouble.done.values()) > before or trouble.wrong, "something happens")

    trains_alike_beside(trouble.run, trouble.over, until_something_has_happened, undisturbed)
    assert not trouble.wrong
    assert line.alive, "it is held all the while"
    x = counted()
    servers[1 - pair.at].ended.clear()  # of the workers that were killed before anybody was sent to them
    os.kill(pair.worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="gone") as lost:
        (x * 2).cpu()
    assert "\n" not in str(lost.value)
    session.deactivate()
    line.release()
    for server in servers:
        eventually(lambda s=server: not s.engine._workers.addresses(), "no worker is left")
        server.ended.clear()
