"""What the manager answers when it is asked which leases are to move for one that waits."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from jupyter_gpupool.core.models import Lease, LeaseState, Request, Server, WorkerAddress
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.scheduling.admission import KEPT_FREE
from jupyter_gpupool.pool.scheduling.policy import SPREAD

from .conftest import Clock


class Pool:
    """Two GPUs, and a manager that puts leases on different ones. ``fixed``: ids of leases that cannot move."""

    def __init__(self, ledger: Ledger, clock: Clock, servers: list[Server], **options: Any) -> None:
        self.fixed: set[str] = set()
        options.setdefault("can_move", lambda lease: lease.id not in self.fixed)
        self.manager = Manager(ledger, clock, ttl_s=1000.0, policy=SPREAD, **options)
        self.manager.set_servers(servers)

    def request(self, partial: float) -> Lease:
        lease = self.manager.request(
            Request(str(uuid.uuid4()), "ada", partial=partial, secret_sha256="ab" * 32)
        ).lease
        assert lease is not None
        if lease.state is LeaseState.GRANTED:
            self.manager.worker_started(lease.id, WorkerAddress("127.0.0.1", 4711, 12345, 999.5))
        return self.manager.lease(lease.id)


@pytest.fixture
def pool(ledger: Ledger, clock: Clock, servers: list[Server]) -> Pool:
    return Pool(ledger, clock, servers)


def test_one_lease_moves_beside_another_and_nobody_takes_its_place_meanwhile(pool: Pool) -> None:
    first, second = pool.request(0.4), pool.request(0.6)
    head = pool.request(1.0)
    assert head.state is LeaseState.QUEUED
    moves = pool.manager.find_moves()
    assert moves is not None and moves.waiting.id == head.id
    assert {lease_id: pieces[0].gpu_uuid for lease_id, pieces in moves.slices.items()} == {
        first.id: second.slices[0].gpu_uuid
    }
    assert [lease.id for lease in moves.leases] == [first.id]
    small = pool.request(0.4)
    assert (small.state, small.waits_for) == (LeaseState.QUEUED, KEPT_FREE)
    pool.manager.release(first.id)
    assert pool.manager.lease(head.id).state is LeaseState.GRANTED
    assert pool.manager.lease(small.id).state is LeaseState.GRANTED, "beside the second"


def test_nothing_moves_that_cannot_or_if_nobody_waits_or_without_room(pool: Pool) -> None:
    first, second = pool.request(0.4), pool.request(0.6)
    assert pool.manager.find_moves() is None, "nobody waits"
    head = pool.request(1.0)
    pool.fixed = {first.id, second.id}
    assert pool.manager.find_moves() is None
    pool.fixed = {first.id}
    moves = pool.manager.find_moves()
    assert moves is not None and list(moves.slices) == [second.id]
    pool.fixed = set()
    pool.manager.release(head.id)
    third = pool.request(0.4)
    assert third.state is LeaseState.ACTIVE and pool.request(1.0).state is LeaseState.QUEUED
    assert pool.manager.find_moves() is None, "there is no room for what would have to move"


def test_without_an_engine_that_moves_nothing_is_kept_for_moves(
    ledger: Ledger, clock: Clock, servers: list[Server]
) -> None:
    pool = Pool(ledger, clock, servers, can_move=None)
    pool.request(0.4)
    pool.request(0.5)
    assert pool.request(1.0).state is LeaseState.QUEUED
    assert pool.manager.find_moves() is None
    assert pool.request(0.4).state is LeaseState.ACTIVE, "on the GPU that is not reserved"
