"""Leases that are parked for others: what the ledger holds of them, what ends them, and who may be parked."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.errors import InvalidRequest, NoCapacity
from jupyter_gpupool.core.models import (
    Lease,
    LeaseState,
    Reclaim,
    Request,
    ResumeWorker,
    Server,
    StopWorker,
    WorkerAddress,
)
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.reclaim import ReclaimPolicy
from jupyter_gpupool.pool.tenancy import audit_log
from jupyter_gpupool.pool.tenancy.audit_log import Entry

from .conftest import Clock

MIB = 32510
POLICY = ReclaimPolicy(Reclaim.IDLE, after_s=100.0, min_resident_s=50.0)


class Pool:
    """A manager over one server, whose engine can park everything that runs."""

    def __init__(
        self, ledger: Ledger, clock: Clock, servers: list[Server], policy: ReclaimPolicy = POLICY
    ) -> None:
        self.ledger, self.clock, self.servers, self.policy = ledger, clock, servers, policy
        self.manager = Manager(ledger, clock, ttl_s=1000.0, reclaim=policy)
        self.manager.set_servers(servers)

    def request(self, num_gpus: int = 1, partial: float = 1.0, owner: str = "ada", **fields: Any) -> Lease:
        asked = Request(
            str(uuid.uuid4()), owner, num_gpus=num_gpus, partial=partial, secret_sha256="ab" * 32, **fields
        )
        lease = self.manager.request(asked).lease
        assert lease is not None
        return lease

    def active(self, *size: Any, **fields: Any) -> Lease:
        lease = self.request(*size, **fields)
        worker = WorkerAddress("127.0.0.1", 4711, 12345, 999.5)
        (lease,) = self.manager.worker_started(lease.id, worker).changed
        return lease

    def park(self, *leases: Lease, host_mib: int = 1000) -> set[str]:
        """Let the pool park what it wants of these; return what it parked."""
        parks = self.manager.find_parks({lease.id: WorkerState(10) for lease in leases}, {"one": host_mib})
        if parks is None:
            return set()
        change = self.manager.park(parks, dict.fromkeys((lease.id for lease in parks.leases), 10))
        return {lease.id for lease in change.changed if lease.state is LeaseState.PARKED}

    def parked(self) -> tuple[Lease, Lease]:
        """A parked lease, and the one that it was parked for."""
        lease = self.active(2)
        self.clock.advance(200)
        other = self.request(2, owner="bob")
        assert other.state is LeaseState.QUEUED
        assert self.park(lease) == {lease.id}
        return self.manager.lease(lease.id), self.manager.lease(other.id)

    def state(self, lease: Lease) -> LeaseState:
        return self.manager.lease(lease.id).state


@pytest.fixture
def pool(ledger: Ledger, clock: Clock, servers: list[Server]) -> Pool:
    return Pool(ledger, clock, servers)


def test_a_parked_lease_frees_its_gpus_and_counts_in_its_namespace(pool: Pool) -> None:
    lease, other = pool.parked()
    assert lease.parked is not None and (lease.parked.memory_mib, lease.position) == (10, None)
    assert other.state is LeaseState.GRANTED
    snapshot = pool.manager.snapshot()
    assert set(snapshot.granted_mib.values()) == {MIB}
    assert snapshot.parked == (lease,) and lease not in snapshot.leases
    with pool.ledger.reading() as tx:
        assert {key: held.gpus for key, held in tx.held().items()} == {
            ("default", "ada"): 2.0,
            ("default", "bob"): 2.0,
        }
    with pytest.raises(NoCapacity, match="is parked"):
        pool.manager.resize(lease.id, 0.5, None)
    assert not pool.ledger.verify()


def test_a_woken_lease_waits_ahead_of_all_requests_and_resumes_with_its_slices(pool: Pool) -> None:
    lease, other = pool.parked()
    early = pool.request(2, owner="cyd")
    assert not pool.manager.wake(lease.id).actions
    assert [(one.id, one.position) for one in pool.manager.snapshot().queue] == [(lease.id, 1), (early.id, 2)]
    assert not pool.manager.wake(lease.id).changed, "engines ask again and again"
    actions = pool.manager.release(other.id).actions
    resumed = pool.manager.lease(lease.id)
    assert [type(action) for action in actions] == [StopWorker, ResumeWorker]
    assert (resumed.state, resumed.slices, resumed.parked) == (LeaseState.ACTIVE, lease.slices, None)
    assert pool.state(early) is LeaseState.QUEUED
    assert not pool.ledger.verify()


def test_it_resumes_on_another_gpu_of_the_same_model_and_can_be_resized_and_parked_again(pool: Pool) -> None:
    lease = pool.active()
    pool.active(owner="bob")
    pool.clock.advance(200)
    small = pool.request(1, 0.5, owner="cyd")
    assert small.state is LeaseState.QUEUED and pool.park(lease) == {lease.id}
    (second,) = [one for one in pool.manager.snapshot().leases if one.request.owner == "bob"]
    pool.manager.release(second.id)
    pool.manager.wake(lease.id)
    resumed = pool.manager.lease(lease.id)
    assert resumed.state is LeaseState.ACTIVE and resumed.slices[0].gpu_uuid == second.slices[0].gpu_uuid
    assert not pool.ledger.verify(), "the database has the new slices"
    with pool.ledger.together():
        pool.manager.release(small.id)
        pool.manager.resize(lease.id, 0.3, None)
    assert not pool.ledger.verify()


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda pool, lease: pool.manager.release(lease.id), LeaseState.RELEASED),
        (lambda pool, lease: (pool.clock.advance(2000), pool.manager.tick())[1], LeaseState.EXPIRED),
        (
            lambda pool, lease: pool.manager.worker_exited(lease.id, LeaseState.LOST, "killed"),
            LeaseState.LOST,
        ),
        (lambda pool, lease: pool.manager.recover({}), LeaseState.LOST),
    ],
)
def test_it_ends_as_an_active_one_does(
    pool: Pool, end: Callable[[Pool, Lease], Any], state: LeaseState
) -> None:
    lease, other = pool.parked()
    pool.manager.wake(lease.id)
    change = end(pool, lease)
    ended = pool.manager.lease(lease.id)
    assert (ended.state, ended.parked, ended.slices) == (state, None, lease.slices)
    if state in (LeaseState.RELEASED, LeaseState.EXPIRED):
        assert StopWorker(lease.id) in change.actions
    assert not pool.ledger.verify()


def test_a_restarted_pool_has_its_parked_leases_and_parks_what_the_engine_has_parked(pool: Pool) -> None:
    lease, other = pool.parked()
    pool.manager.worker_started(other.id, WorkerAddress("127.0.0.1", 1, 2, 3.0))
    pool.manager.wake(lease.id)
    again = Pool(pool.ledger, pool.clock, pool.servers)
    workers = {one.id: one.worker for one in (lease, again.manager.lease(other.id)) if one.worker}
    again.manager.recover(workers, {lease.id, other.id})
    # The other one was parked before the pool could record it, so the woken one has room now.
    assert (again.state(lease), again.state(other)) == (LeaseState.ACTIVE, LeaseState.PARKED)
    assert not pool.ledger.verify()


def test_nothing_is_recorded_once_nobody_waits_or_the_lease_has_changed(pool: Pool) -> None:
    lease = pool.active(2)
    pool.clock.advance(200)
    other = pool.request(2)
    states, arenas = {lease.id: WorkerState(10)}, {"one": 1000}
    parks = pool.manager.find_parks(states, arenas)
    assert parks is not None
    pool.manager.resize(lease.id, 0.9, None)
    assert not pool.manager.park(parks, {lease.id: 10}).changed
    parks = pool.manager.find_parks(states, arenas)
    assert parks is not None
    pool.manager.release(other.id)
    assert not pool.manager.park(parks, {lease.id: 10}).changed
    assert pool.state(lease) is LeaseState.ACTIVE


def test_a_lease_whose_state_cannot_be_brought_back_is_lost_and_its_worker_ends(pool: Pool) -> None:
    lease, other = pool.parked()
    pool.manager.release(other.id)
    pool.manager.wake(lease.id)
    change = pool.manager.resume_failed(lease.id, "the worker does not answer")
    assert pool.state(lease) is LeaseState.LOST and change.actions == (StopWorker(lease.id),)


def test_who_may_be_parked(pool: Pool) -> None:
    first, second = pool.active(), pool.active()
    pool.request()
    assert not pool.park(first, second), "they have not been idle for long"
    pool.clock.advance(99)
    pool.manager.computing([second.id])
    pool.clock.advance(1)
    assert not pool.park(first, second, host_mib=5), "there is no host memory for it"
    assert not pool.park(second), "it has computed a moment ago"
    assert pool.park(first, second) == {first.id}


def test_nobody_is_parked_for_a_request_beyond_the_pools_ratio_but_for_a_lease_that_wakes(
    ledger: Ledger, clock: Clock, servers: list[Server]
) -> None:
    pool = Pool(ledger, clock, servers, ReclaimPolicy(Reclaim.IDLE, 10.0, 10.0, oversubscribe=1.5))
    first, second = pool.active(), pool.active()
    third = pool.request()
    clock.advance(100)
    assert len(pool.park(first, second)) == 1, "three leases on two GPUs"
    assert pool.state(third) is LeaseState.GRANTED
    fourth = pool.request()
    clock.advance(100)
    assert not pool.park(first, second)
    (asleep,) = pool.manager.snapshot().parked
    pool.manager.wake(asleep.id)
    other = {first.id: second, second.id: first}[asleep.id]
    assert pool.park(first, second) == {other.id}
    assert pool.state(asleep) is LeaseState.ACTIVE and pool.state(fourth) is LeaseState.QUEUED


def test_a_lease_that_asked_for_it_is_never_parked_and_a_namespace_has_its_own_time(pool: Pool) -> None:
    kept, other = pool.active(never_park=True), pool.active()
    pool.request(owner="bob")
    pool.clock.advance(99)
    assert not pool.park(kept, other)
    edit = {"limits": {"reclaim_after_s": 60}}
    pool.manager.administer(lambda names, tx: names.change(tx, "default", edit, None), Entry(0.0, "", ""))
    assert pool.park(kept, other) == {other.id}
    pool.request(owner="bob")
    pool.clock.advance(5000)
    assert not pool.park(kept)
    with pool.ledger.reading() as tx:
        found = tx.lease(kept.id)
    assert found is not None and found.request.never_park
    assert not pool.ledger.verify(), "the database has it, too"


def test_a_namespace_chooses_and_the_pool_has_a_default(
    ledger: Ledger, clock: Clock, servers: list[Server]
) -> None:
    pool = Pool(ledger, clock, servers, ReclaimPolicy(Reclaim.NEVER, 10.0, 10.0))

    def choose(reclaim: object) -> None:
        pool.manager.administer(
            lambda known, tx: known.change(tx, "default", {"reclaim": reclaim}, None), Entry(0.0, "", "")
        )

    lease = pool.active(2)
    pool.request(2)
    clock.advance(100)
    assert not pool.park(lease)
    choose("never")
    assert not pool.park(lease)
    with pytest.raises(InvalidRequest, match="never, idle"):
        choose("always")
    choose("idle")
    assert Manager(ledger, clock).namespaces.find("default").reclaim is Reclaim.IDLE
    assert pool.park(lease) == {lease.id}


def test_the_audit_trail_says_for_whom_and_names_no_user_of_another_namespace(pool: Pool) -> None:
    lease, other = pool.parked()
    with pool.ledger.reading() as tx:
        entries = audit_log.read(tx)
    assert [entry.outcome for entry in entries if entry.action == "park"] == [
        f"for bob's lease {other.id}; 10 MiB are kept in host memory"
    ]
    pool.manager.release(other.id)
    pool.manager.wake(lease.id)
    pool.clock.advance(200)
    pool.manager.heartbeat(lease.id)
    third = pool.request(2, owner="cyd", namespace="another")
    assert pool.park(lease) == {lease.id}
    with pool.ledger.reading() as tx:
        outcomes = [entry.outcome for entry in audit_log.read(tx) if entry.action == "park"]
    assert f"for lease {third.id}; 10 MiB are kept in host memory" in outcomes


def test_nobody_is_parked_where_one_that_comes_first_would_get_the_room(pool: Pool) -> None:
    pool.active(1, 0.9, never_park=True, filters={"index": "0"})
    pool.active(1, 0.3, never_park=True, filters={"index": "1"})
    idle = pool.active(1, 0.5, filters={"index": "1"})
    first = pool.request(1, 1.0, owner="bob", filters={"index": "1"}, namespace="another")
    second = pool.request(1, 0.4, owner="cyd")
    pool.clock.advance(200)
    assert not pool.park(idle), "the GPU is kept for the first"
    pool.manager.release(first.id)
    assert pool.park(idle) == {idle.id}
    assert pool.state(second) is LeaseState.GRANTED


def test_nobody_is_parked_where_the_room_makes_one_that_comes_first_wait_there(
    ledger: Ledger, clock: Clock, servers: list[Server]
) -> None:
    pool = Pool(ledger, clock, servers)
    for share in (0.5, 0.4):
        pool.active(1, share, never_park=True, filters={"index": "0"})
    pool.active(1, 0.3, never_park=True, filters={"index": "1"})
    idle = [pool.active(1, share, filters={"index": "1"}) for share in (0.2, 0.25, 0.25)]
    pool.request(1, 1.0, owner="bob", namespace="another")
    second = pool.request(1, 0.65, owner="cyd")
    pool.clock.advance(200)
    assert not pool.park(*idle), "once they are parked, the first waits for one lease there, and not for two"
    assert pool.state(second) is LeaseState.QUEUED
