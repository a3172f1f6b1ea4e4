"""What the pool does where its engine cannot park or resume a lease: it says why, and keeps what it can."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import (
    Change,
    Lease,
    LeaseState,
    Reclaim,
    Request,
    ResumeWorker,
    Server,
    WorkerAddress,
)
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.reclaim import ReclaimPolicy
from jupyter_gpupool.server.service.manager_access import ManagerAccess
from jupyter_gpupool.server.service.reclaiming import Reclaiming


class Workers:
    """An engine's half of parking, for two leases with a GPU each. ``broken``: what it cannot park or resume."""

    def __init__(self, lease_ids: list[str]) -> None:
        self.lease_ids = lease_ids
        self.broken: set[str] = set()
        self.asleep: set[str] = set()

    def on_wake(self, wake: Any) -> None:
        pass

    def states(self) -> Mapping[str, WorkerState]:
        return {lease_id: WorkerState(1) for lease_id in self.lease_ids if lease_id not in self.asleep}

    def arenas(self) -> Mapping[str, int]:
        return {"one": 100}

    def parked(self) -> Collection[str]:
        return self.asleep

    async def park_worker(self, lease: Lease) -> int:
        if lease.id in self.broken:
            raise EngineError("it computes")
        self.asleep.add(lease.id)
        return 1

    async def resume_worker(self, lease: Lease) -> WorkerAddress:
        if lease.id in self.broken:
            raise EngineError("its worker does not answer")
        self.asleep.discard(lease.id)
        assert lease.worker is not None
        return lease.worker

    async def move_worker(self, lease: Lease) -> WorkerAddress:
        raise EngineError("there is one server")


class Pool:
    """Two idle leases, and a request that needs the GPUs of both."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{path / 'ledger.sqlite'}")
        policy = ReclaimPolicy(Reclaim.IDLE, 0.0, 0.0)
        self.manager = Manager(self.ledger, lambda: 1000.0, reclaim=policy)
        self.manager.set_servers([Server("one", "127.0.0.1", emulated_gpus("one", count=2, memory_mib=100))])
        self.idle = [self.request(1), self.request(1)]
        for lease in self.idle:
            self.manager.worker_started(lease.id, WorkerAddress("127.0.0.1", 1, 2, 3.0))
        self.waiting = self.request(2)
        self.engine = Workers([lease.id for lease in self.idle])
        self.actions: list[Any] = []

    def request(self, num_gpus: int) -> Lease:
        asked = Request(str(uuid.uuid4()), "ada", num_gpus=num_gpus, partial=1.0, secret_sha256="ab" * 32)
        lease = self.manager.request(asked).lease
        assert lease is not None
        return lease

    def states(self) -> list[LeaseState]:
        return [self.manager.lease(lease.id).state for lease in (*self.idle, self.waiting)]

    async def look(self) -> None:
        """Let the pool look once."""
        tasks: list[asyncio.Task[None]] = []

        async def call(function: Any, *args: Any) -> Any:
            return function(*args)

        async def run(function: Any, *args: Any) -> Change:
            change: Change = function(*args)
            self.actions += change.actions
            return change

        def spawn(coroutine: Coroutine[Any, Any, None]) -> None:
            tasks.append(asyncio.create_task(coroutine))

        engine: Any = self.engine
        log = logging.getLogger("gpupool-test")
        Reclaiming(engine, ManagerAccess(call, run, lambda: self.manager, spawn, log)).look()
        await asyncio.gather(*tasks)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path)


def test_both_are_parked_and_the_one_that_waits_starts(pool: Pool) -> None:
    asyncio.run(pool.look())
    assert pool.states() == [LeaseState.PARKED, LeaseState.PARKED, LeaseState.GRANTED]
    assert pool.engine.asleep == {lease.id for lease in pool.idle}


def test_where_one_cannot_be_parked_all_stay_as_they_were(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.engine.broken = {pool.idle[1].id}
    asyncio.run(pool.look())
    assert pool.states() == [LeaseState.ACTIVE, LeaseState.ACTIVE, LeaseState.QUEUED]
    assert not pool.engine.asleep, "the other one was resumed"
    assert f"No lease is parked for lease {pool.waiting.id}: it computes" in caplog.text


def test_what_was_parked_for_nothing_and_cannot_be_resumed_is_lost_with_a_reason(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pool.idle

    async def park_and_break(lease: Lease) -> int:
        if lease.id == second.id:
            raise EngineError("it computes")
        pool.engine.broken = {lease.id}
        return 1

    monkeypatch.setattr(pool.engine, "park_worker", park_and_break)
    asyncio.run(pool.look())
    lost = pool.manager.lease(first.id)
    assert lost.state is LeaseState.LOST
    assert lost.reason == "its state could not be brought back: its worker does not answer"
    assert not any(isinstance(action, ResumeWorker) for action in pool.actions)
