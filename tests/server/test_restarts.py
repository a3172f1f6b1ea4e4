"""A pool that is killed again and again while clients come and go: no share is granted twice, none is lost."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jupyter_core.paths import jupyter_runtime_dir

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.transport.frames import WireError
from jupyter_gpupool.transport.handshake import Refused
from jupyter_gpupool.transport.lifeline import Lifeline

from ..conftest import often
from ..support.ports import free_port
from .conftest import Pool, ask, attach_spec

MEMORY_MIB = 32510
RESTARTS = often(10, 50)


class Client(threading.Thread):
    """Requests, holds for a moment, releases; again and again, whatever happens to the pool."""

    def __init__(self, pool: Pool, seed: int) -> None:
        super().__init__(daemon=True)
        self.random = random.Random(seed)
        self.client = pool.client
        self.over = threading.Event()
        self.answers = 0
        self.held = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self.once()
            except (PoolError, Refused, WireError, OSError):
                continue  # that lease came to nothing; the next one may
            except Exception as e:
                self.failure = e
                return

    def once(self) -> None:
        request = ask(self.random.choice([0.2, 0.3, 0.45, 0.8]), self.random.choice([1, 1, 2]))
        try:
            lease = self.client.request(request, wait_s=1.0)
            self.answers += 1
            if lease.state is LeaseState.ACTIVE:
                line = Lifeline(attach_spec(lease))
                self.held += 1
                self.over.wait(self.random.random() * 0.3)
                line.release()
        finally:
            with contextlib.suppress(PoolError):
                self.client.release(request.id)


def granted_by_ledger(url: str) -> Counter:
    ledger = Ledger(url)
    try:
        with ledger.reading() as tx:
            return Counter(tx.granted_mib())
    finally:
        ledger.close()


def computing_workers() -> list[str]:
    """Leases whose worker is alive, as the workers themselves say."""
    found = []
    for file in (Path(jupyter_runtime_dir()) / "gpupool").glob("workers-*/*.json"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            state = json.loads(file.read_text())
            if "code" not in state and psutil.Process(state["pid"]).status() != psutil.STATUS_ZOMBIE:
                found.append(state["lease"])
    return found


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_killed_again_and_again_during_grants(
    start_pool: Callable[..., Pool], tmp_path: Path, eventually: Callable
) -> None:
    chance = random.Random(7)
    port, url = free_port(), f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    options = ("--persistent", "--PoolService.ttl_s=20", "--LocalEngine.attach_timeout_s=3")
    pool = start_pool(*options, port=port)
    clients = [Client(pool, seed) for seed in range(5)]
    for client in clients:
        client.start()
    grants = 0
    for _ in range(RESTARTS):
        # A pool that nobody has reached yet has granted nothing.
        before = sum(client.answers for client in clients)
        eventually(
            lambda before=before: (
                sum(client.answers for client in clients) > before or any(c.failure for c in clients)
            ),
            "the pool answers a request",
        )
        pause = threading.Event()
        pause.wait(chance.random() * 0.8)  # when to strike is chance; nothing below depends on it
        pool.process.kill()
        pool.process.wait()
        granted = granted_by_ledger(url)
        grants += sum(granted.values()) > 0
        assert all(mib <= MEMORY_MIB for mib in granted.values()), granted
        pool = start_pool(*options, port=port)
    eventually(lambda: sum(client.held for client in clients) > 0, "clients hold leases")
    for client in clients:
        client.over.set()
    for client in clients:
        client.join(300)
        assert client.failure is None, client.failure
    assert grants > RESTARTS / 5, "the kills hardly ever met a grant"
    eventually(lambda: sum(pool.granted_mib()) == 0, "every share comes back")
    eventually(lambda: not computing_workers(), "no worker is left")
    lease, line = pool.hold(ask(1.0, 2))
    assert lease.state is LeaseState.ACTIVE, "all of it can be granted again"
    line.release()


def test_a_lease_computes_on_while_its_pool_is_killed(
    start_pool: Callable[..., Pool], eventually: Callable
) -> None:
    port = free_port()
    pool = start_pool("--persistent", port=port)
    lease, line = pool.hold(ask(0.5))
    pool.process.kill()
    pool.process.wait()
    pool = start_pool("--persistent", port=port)
    after = pool.client.heartbeat(lease.id)
    assert (after.state, after.worker, after.slices) == (LeaseState.ACTIVE, lease.worker, lease.slices)
    assert line.alive
    assert sum(pool.granted_mib()) == lease.slices[0].memory_mib
    line.release()
    eventually(lambda: pool.client.lease(lease.id).state is LeaseState.RELEASED, "the new pool sees its end")
