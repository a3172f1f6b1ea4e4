"""Two daemons on one PostgreSQL ledger: one leads, the other answers questions and takes its place."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import NoCapacity, NotLeading, PoolError
from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.transport.lifeline import Lifeline

from ..conftest import PATIENCE_S, often
from ..support.ports import free_port
from .conftest import ask, attach_spec, begun

KILLS = often(3, 100)
WITHOUT_WORKERS = Path(__file__).parents[2] / "benchmarks" / "pool_without_workers.py"


class Daemons:
    """Two servers of one pool, each at a port that it keeps when it is started again."""

    def __init__(self, db_url: str, *program: str) -> None:
        self.program = program
        self.options = [f"--db-url={db_url}", "--PoolService.ttl_s=60", "--persistent", "--emulate"]
        self.urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
        self.processes: dict[str, subprocess.Popen] = {}
        self.ledger = Ledger(db_url)

    def start(self, url: str) -> None:
        port = url.rpartition(":")[2]
        self.processes[url] = subprocess.Popen(
            [sys.executable, *self.program, f"--port={port}", *self.options]
        )

    def kill(self, url: str) -> None:
        self.processes[url].kill()
        self.processes[url].wait()

    def leader(self) -> str:
        """Where the one answers that leads; empty while none does."""
        for url in self.urls:
            with contextlib.suppress(PoolError, KeyError), self.client(url) as client:
                client.health()  # it answers
                try:
                    client.release("no-such-lease")
                except NotLeading:
                    continue
                except PoolError:
                    return url
        return ""

    def other(self, url: str) -> str:
        return self.urls[1 - self.urls.index(url)]

    def client(self, *urls: str, patience_s: float = 0.0) -> PoolClient:
        first, *also = urls
        return PoolClient(
            first, discovery.user_token(), timeout_s=PATIENCE_S, patience_s=patience_s, also=also
        )

    def answers(self, url: str) -> bool:
        assert self.processes[url].poll() is None, "it ended"
        try:
            return httpx.get(f"{url}/gpupool/api/v1/openapi.json", timeout=5.0).status_code in (200, 401)
        except httpx.HTTPError:
            return False

    def end(self) -> None:
        self.ledger.close()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def two(postgresql: Any, eventually: Callable) -> Iterator[Callable[..., Daemons]]:
    """``two(*program)``: both answer, one of them leads."""
    with contextlib.ExitStack() as stack:

        def start(*program: str) -> Daemons:
            daemons = Daemons(stack.enter_context(postgresql.database("ready")), *program)
            stack.callback(daemons.end)
            for url in daemons.urls:
                daemons.start(url)
            for url in daemons.urls:
                eventually(lambda url=url: daemons.answers(url), f"{url} answers")
            eventually(daemons.leader, "one leads")
            return daemons

        yield start


def test_the_one_that_follows_answers_questions_and_refuses_changes(
    two: Callable[..., Daemons], capfd: pytest.CaptureFixture[str]
) -> None:
    daemons = two(str(WITHOUT_WORKERS))
    leader = daemons.leader()
    with daemons.client(leader) as first, daemons.client(daemons.other(leader)) as second:
        lease = begun(first, ask(0.5))
        assert second.pool()["servers"] == first.pool()["servers"]
        assert [found.id for found in second.leases()] == [lease.id]
        seen, told = second.lease(lease.id), first.lease(lease.id)
        assert (seen.state, seen.slices, seen.worker) == (told.state, told.slices, told.worker)
        assert second.forecast(ask(0.5))["outcome"] == "granted"
        assert second.forecast(ask(0.5, 5))["outcome"] == "impossible"
        assert set(second.history()) == set(first.history())
        assert second.health()["status"] in ("ok", "warning")  # of a disk that is busy
        for change in (
            lambda: second.request(ask(0.5)),
            lambda: second.heartbeat(lease.id),
            lambda: second.release(lease.id),
            lambda: second.resize(lease.id, 0.2),
        ):
            with pytest.raises(NotLeading, match=f"does not lead the pool, the one at {leader} does"):
                change()
        first.release(lease.id)
        assert second.wait(lease.id, lease, wait_s=30).state is LeaseState.RELEASED
    with daemons.client(daemons.other(leader), leader) as either:
        assert either.request(ask(0.5)).state.holds, "a client that knows both gets there"
    assert " 503 " not in capfd.readouterr().err, "none of this is an error of the server"


class Client(threading.Thread):
    """Requests and releases without end, whoever leads; keeps what it was told, when the call returned."""

    def __init__(self, daemons: Daemons, seed: int) -> None:
        super().__init__(daemon=True)
        self.random = random.Random(seed)
        self.client = daemons.client(*daemons.urls, patience_s=PATIENCE_S)
        self.over = threading.Event()
        self.slices: dict[str, tuple] = {}
        self.ended: dict[str, LeaseState] = {}
        self.calls = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self.once()
        except Exception as e:
            self.failure = e

    def once(self) -> None:
        self.calls += 1
        held = [lease_id for lease_id in self.slices if lease_id not in self.ended]
        if held and self.random.random() < len(held) / 8:
            lease_id = self.random.choice(held)
            self.ended[lease_id] = self.client.release(lease_id).state
            return
        with contextlib.suppress(NoCapacity):
            lease = self.client.request(
                ask(self.random.choice([0.1, 0.2, 0.4]), self.random.choice([1, 1, 2]), wait=False)
            )
            assert lease.state.holds, lease
            self.slices[lease.id] = lease.slices


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_leader_is_killed_under_load(two: Callable[..., Daemons], eventually: Callable) -> None:
    daemons = two(str(WITHOUT_WORKERS))
    clients = [Client(daemons, seed) for seed in range(4)]
    for client in clients:
        client.start()
    chance = random.Random(6)
    longest = 0.0
    for _ in range(KILLS):
        leader = eventually(daemons.leader, "one leads")
        other = daemons.other(leader)
        eventually(lambda other=other: daemons.answers(other), "the other one is there to take over")
        calls = [client.calls for client in clients]
        eventually(
            lambda before=calls: (
                all(c.calls > n + chance.randint(0, 20) for c, n in zip(clients, before))
                or any(c.failure for c in clients)
            ),
            "all clients get on",
        )
        assert not [client.failure for client in clients if client.failure]
        daemons.kill(leader)
        killed = time.monotonic()
        eventually(lambda other=other: daemons.leader() == other, "the other one leads")
        longest = max(longest, time.monotonic() - killed)
        daemons.start(leader)
    for client in clients:
        client.over.set()
    for client in clients:
        client.join(300)
        assert client.failure is None, client.failure
    print(f"{KILLS} kills, {sum(len(c.slices) for c in clients)} grants, takeover within {longest:.1f} s")

    with daemons.ledger.reading() as tx:
        ledger = {lease.id: lease for lease in tx.leases(tuple(LeaseState))}
        counted = Counter(tx.granted_mib())
    held: Counter[str] = Counter()
    for lease in ledger.values():
        for piece in lease.slices if lease.state.holds else ():
            held[piece.gpu_uuid] += piece.memory_mib
    assert +counted == +held, "not one MiB is lost or held by nobody"
    told: Counter[str] = Counter()
    for client in clients:
        for lease_id, slices in client.slices.items():
            assert ledger[lease_id].slices == slices, "what was told to a client is what the ledger has"
            ended = client.ended.get(lease_id)
            if ended is not None:
                assert ledger[lease_id].state is ended
                continue
            assert ledger[lease_id].state.holds, f"a lease was lost: {ledger[lease_id]}"
            for piece in slices:
                told[piece.gpu_uuid] += piece.memory_mib
    memory = {piece.gpu_uuid: piece.total_mib for lease in ledger.values() for piece in lease.slices}
    assert all(mib <= memory[uuid] for uuid, mib in told.items()), "never granted twice"
    assert sum(len(client.slices) for client in clients) > KILLS, "there were grants to lose"


def test_the_successor_finds_the_workers(two: Callable[..., Daemons], eventually: Callable) -> None:
    """A lease computes on, its holder hears nothing of it, and its end is seen by the one that took over."""
    pytest.importorskip("torch", reason="workers need PyTorch")
    # The holder attaches in its own time, as a busy machine allows.
    daemons = two("-m", "jupyter_gpupool.server.daemon.pool_app", "--LocalEngine.attach_timeout_s=600")
    leader = daemons.leader()
    with daemons.client(*daemons.urls, patience_s=PATIENCE_S) as client:
        lease = begun(client, ask(0.5))
        line = Lifeline(attach_spec(lease))
        daemons.kill(leader)
        after = client.heartbeat(lease.id)
        assert (after.state, after.worker, after.slices) == (LeaseState.ACTIVE, lease.worker, lease.slices)
        assert line.alive
        line.release()
        eventually(lambda: client.lease(lease.id).state is LeaseState.RELEASED, "its end is seen")
