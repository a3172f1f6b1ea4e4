"""Leases that move to another server: what the ledger holds of them meanwhile, and where they may go."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.errors import LeaseEnded, NoCapacity
from jupyter_gpupool.core.models import (
    Lease,
    LeaseState,
    MoveWorker,
    Request,
    Server,
    StopWorker,
    WorkerAddress,
)
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.scheduling.policy import SPREAD
from jupyter_gpupool.pool.tenancy import audit_log
from jupyter_gpupool.pool.tenancy.audit_log import Entry

from .conftest import Clock
from .test_parked_leases import POLICY

WORKER = WorkerAddress("127.0.0.1", 4711, 12345, 999.5)
OTHER = WorkerAddress("127.0.0.2", 4712, 12346, 1999.5)


@pytest.fixture
def servers() -> list[Server]:
    """Two servers of one GPU each, and one with another model."""
    return [
        Server("one", "127.0.0.1", emulated_gpus("one", 1)),
        Server("two", "127.0.0.2", emulated_gpus("two", 1)),
        Server("old", "127.0.0.3", emulated_gpus("old", 1, "K80 (emulated)", 12000)),
    ]


class Pool:
    def __init__(self, ledger: Ledger, clock: Clock, servers: list[Server]) -> None:
        self.ledger, self.clock, self.servers = ledger, clock, servers
        self.manager = self.new_manager()
        self.manager.set_servers(servers)

    def new_manager(self) -> Manager:
        return Manager(self.ledger, self.clock, ttl_s=1000.0, reclaim=POLICY, may_move=True)

    def request(self, partial: float = 0.5, **fields: Any) -> Lease:
        asked = Request(str(uuid.uuid4()), "ada", partial=partial, secret_sha256="ab" * 32, **fields)
        lease = self.manager.request(asked).lease
        assert lease is not None
        return lease

    def active(self, partial: float = 0.5, server: str = "one", **fields: Any) -> Lease:
        lease = self.request(partial, filters={"name": "V100"}, **fields)
        assert lease.slices[0].server == server
        return self.manager.worker_started(lease.id, WORKER).changed[0]

    def granted(self) -> dict[str, int]:
        granted = self.manager.snapshot().granted_mib
        return {s.name: granted[gpu.uuid] for s in self.servers for gpu in s.gpus}

    def why(self, lease: Lease) -> str:
        with pytest.raises(NoCapacity) as refused:
            self.manager.move(lease.id, "because")
        return str(refused.value)

    def audit(self) -> list[tuple[str, str]]:
        with self.ledger.reading() as tx:
            return [(entry.action, entry.outcome) for entry in audit_log.read(tx, 0.0, 100)]


@pytest.fixture
def pool(ledger: Ledger, clock: Clock, servers: list[Server]) -> Pool:
    return Pool(ledger, clock, servers)


def test_a_lease_holds_slices_of_both_servers_until_it_has_moved(pool: Pool) -> None:
    lease = pool.active()
    change = pool.manager.move(lease.id, "because one is drained")
    (action,) = change.actions
    assert isinstance(action, MoveWorker) and action.lease == change.lease
    assert pool.granted() == {"one": 16255, "two": 16255, "old": 0}
    with pytest.raises(NoCapacity, match="being moved"):
        pool.manager.resize(lease.id, 0.2, None)
    assert pool.why(lease) == "it is being moved already"
    moved = pool.manager.moved(lease.id, OTHER, "in 1.0 s").lease
    assert moved is not None and (moved.state, moved.worker, moved.moving_to) == (
        LeaseState.ACTIVE,
        OTHER,
        (),
    )
    assert [piece.server for piece in moved.slices] == ["two"]
    assert pool.granted() == {"one": 0, "two": 16255, "old": 0}
    assert pool.audit()[-2:] == [
        ("move", "to GPU 0 of two: 16255 MiB, because one is drained"),
        ("moved", "from one to two, in 1.0 s"),
    ]
    assert pool.manager.lease(lease.id) == moved and not pool.ledger.verify()


def test_what_it_leaves_is_granted_to_who_waits_and_not_before(pool: Pool) -> None:
    lease = pool.active()
    waiting = pool.request(1.0, filters={"server": "one"})
    pool.manager.move(lease.id, "because")
    assert pool.manager.lease(waiting.id).state is LeaseState.QUEUED
    pool.manager.moved(lease.id, OTHER)
    assert pool.manager.lease(waiting.id).state is LeaseState.GRANTED


def test_a_move_that_fails_changes_nothing_in_the_end(pool: Pool) -> None:
    lease = pool.active()
    pool.manager.move(lease.id, "because")
    pool.manager.move_failed(lease.id, "the wire broke")
    assert pool.manager.lease(lease.id) == lease
    assert pool.granted() == {"one": 16255, "two": 0, "old": 0}
    assert pool.audit()[-1] == ("stay", "on one: the wire broke")


@pytest.mark.parametrize("how", ["release", "worker_exited"])
def test_one_that_ends_meanwhile_leaves_both_servers(pool: Pool, how: str) -> None:
    lease = pool.active()
    pool.manager.move(lease.id, "because")
    if how == "release":
        assert StopWorker(lease.id) in pool.manager.release(lease.id).actions
    else:
        pool.manager.worker_exited(lease.id, LeaseState.LOST, "it died")
    assert set(pool.granted().values()) == {0}
    assert pool.manager.moved(lease.id, OTHER).actions == (StopWorker(lease.id),)
    assert not pool.manager.move_failed(lease.id, "it has ended").changed
    with pytest.raises(LeaseEnded):
        pool.manager.move(lease.id, "because")
    assert not pool.ledger.verify()


def test_what_cannot_move_is_refused_with_the_reason(pool: Pool) -> None:
    here = pool.manager.worker_started(pool.request(filters={"server": "one"}).id, WORKER).changed[0]
    assert pool.why(here) == "no other GPU server has a GPU of its model that its request allows"
    lease = pool.active()
    full = pool.active(1.0, "two")
    assert pool.why(lease) == "no other GPU server has 16255 MiB of a GPU free"
    pool.manager.release(full.id)
    pool.manager.drain("two")
    assert pool.why(lease).endswith("that its request allows"), "a drained server gets nothing"
    assert pool.why(pool.request(filters={"name": "K80"})) == "its worker is not up yet"
    pool.manager.drain("two", False)
    both = pool.manager.worker_started(pool.request(0.4, num_gpus=2, spread=True).id, WORKER).changed[0]
    assert len({piece.server for piece in both.slices}) == 2
    assert pool.why(both) == "it spans servers, and moves only where one of them is drained"


@pytest.fixture
def three(ledger: Ledger, clock: Clock) -> Pool:
    """Three servers of two GPUs each."""
    servers = [Server(name, "127.0.0.1", emulated_gpus(name, 2)) for name in ("one", "two", "three")]
    return Pool(ledger, clock, servers)


def spread(pool: Pool) -> Lease:
    """A lease of all GPUs of the servers one and two."""
    lease = pool.request(1.0, num_gpus=4, spread=True, filters={})
    lease = pool.manager.worker_started(lease.id, WORKER).changed[0]
    assert len({piece.server for piece in lease.slices}) == 2
    return lease


def test_a_part_of_a_lease_leaves_a_server_and_the_others_stay(three: Pool) -> None:
    lease = spread(three)
    left, stays = lease.slices[0].server, lease.slices[2].server
    (free,) = {"one", "two", "three"} - {left, stays}
    (action,) = three.manager.move(lease.id, "because one is drained", leaving=left).actions
    assert isinstance(action, MoveWorker)
    moving = action.lease
    assert [piece.server for piece in moving.moving_to] == [free, free, stays, stays]
    assert moving.leaving == lease.slices[:2] and moving.arriving == moving.moving_to[:2]
    assert set(three.manager.snapshot().granted_mib.values()) == {32510}, "it holds both"
    assert not three.ledger.verify()
    three.manager.moved(lease.id, OTHER)
    moved = three.manager.lease(lease.id)
    assert moved.slices == moving.moving_to and not moved.moving_to
    assert not three.ledger.verify()
    outcomes = [entry for entry in three.audit() if entry[0] == "moved"]
    assert f"from {left} to {free}" in str(outcomes)
    here = three.request(1.0, num_gpus=2, filters={"server": left})
    assert three.manager.lease(here.id).state is LeaseState.GRANTED, "what it left is others'"
    assert three.why(moved) == "it spans servers, and moves only where one of them is drained"
    with pytest.raises(NoCapacity, match="no GPU server that it does not use has 32510 MiB of 2 GPUs free"):
        three.manager.move(lease.id, "because", leaving=free)


def test_a_move_of_a_part_that_fails_frees_only_what_was_to_be_reached(three: Pool) -> None:
    lease = spread(three)
    three.manager.move(lease.id, "because one is drained", leaving=lease.slices[2].server)
    three.manager.move_failed(lease.id, "it did not work")
    now = three.manager.lease(lease.id)
    assert (now.slices, now.moving_to, now.state) == (lease.slices, (), LeaseState.ACTIVE)
    assert sorted(three.manager.snapshot().granted_mib.values()) == [0, 0, *[32510] * 4]
    three.manager.move(lease.id, "because one is drained", leaving=lease.slices[0].server)
    three.manager.release(lease.id)
    assert set(three.manager.snapshot().granted_mib.values()) == {0}
    assert not three.ledger.verify()


def test_a_parked_lease_that_spans_servers_resumes_on_all_of_them_or_on_none(three: Pool) -> None:
    lease = spread(three)
    servers = [lease.slices[k].server for k in (0, 2)]
    (free,) = {"one", "two", "three"} - set(servers)
    three.clock.advance(200)
    others = [three.request(1.0, filters={"server": servers[0]}, num_gpus=2)]
    state = {lease.id: WorkerState(30, by_server={servers[0]: 10, servers[1]: 20})}
    assert three.manager.find_parks(state, dict.fromkeys(servers, 15)) is None, "one has too little memory"
    parks = three.manager.find_parks(state, dict.fromkeys(servers, 25))
    assert parks is not None and [one.id for one in parks.leases] == [lease.id]
    three.manager.park(parks, {lease.id: 30})
    parked = three.manager.lease(lease.id)
    assert parked.parked is not None and parked.parked.by_server == {servers[0]: 10, servers[1]: 20}
    assert not three.ledger.verify()
    assert three.manager.lease(others[0].id).state is LeaseState.GRANTED
    with pytest.raises(NoCapacity, match=f"it is parked, and what it had on {servers[0]} is not free"):
        three.manager.move(lease.id, "because", leaving=servers[1])
    assert not three.manager.wake(lease.id).actions, "there is room on one of its servers alone"
    others.append(three.request(0.5, filters={"server": servers[1]}))
    assert three.manager.lease(others[1].id).state is LeaseState.QUEUED, "which is kept for it"
    three.manager.release(others[0].id)
    now = three.manager.lease(lease.id)
    assert (now.state, now.slices) == (LeaseState.ACTIVE, lease.slices)
    assert not three.ledger.verify()


def test_a_part_of_a_parked_lease_moves_and_all_of_it_runs(three: Pool) -> None:
    lease = spread(three)
    left = lease.slices[0].server
    three.clock.advance(200)
    other = three.request(1.0, filters={"server": left}, num_gpus=2)
    parks = three.manager.find_parks({lease.id: WorkerState(10)}, {left: 1000})
    assert parks is not None
    three.manager.park(parks, {lease.id: 10})
    three.manager.move(lease.id, "because one is drained", leaving=left)
    assert set(three.manager.snapshot().granted_mib.values()) == {32510}, "all that it is to have"
    three.manager.moved(lease.id, OTHER)
    now = three.manager.lease(lease.id)
    assert now.state is LeaseState.ACTIVE and left not in {piece.server for piece in now.slices}
    assert three.manager.lease(other.id).state is LeaseState.GRANTED
    assert not three.ledger.verify()


def parked(pool: Pool) -> Lease:
    """A parked lease of server one, whose GPU another one has."""
    lease = pool.active(1.0)
    pool.clock.advance(200)
    pool.request(1.0, filters={"server": "one"})
    parks = pool.manager.find_parks({lease.id: WorkerState(10)}, {"one": 1000})
    assert parks is not None
    pool.manager.park(parks, {lease.id: 10})
    return pool.manager.lease(lease.id)


def test_a_parked_lease_whose_gpu_is_taken_wakes_at_another_server(pool: Pool) -> None:
    lease = parked(pool)
    (action,) = pool.manager.wake(lease.id).actions
    assert isinstance(action, MoveWorker)
    moving = pool.manager.lease(lease.id)
    assert (moving.state, moving.position) == (LeaseState.PARKED, None)
    assert pool.granted() == {"one": 32510, "two": 32510, "old": 0}
    assert not pool.manager.wake(lease.id).changed, "its program reminds the pool again and again"
    pool.manager.moved(lease.id, OTHER)
    moved = pool.manager.lease(lease.id)
    assert (moved.state, moved.parked, moved.slices[0].server) == (LeaseState.ACTIVE, None, "two")
    assert pool.audit()[-1][0] == "resume", "the report of usage counts its hours from there"
    assert not pool.ledger.verify()


def test_a_woken_lease_that_cannot_be_moved_waits_and_is_tried_again(pool: Pool) -> None:
    lease = parked(pool)
    pool.manager.wake(lease.id)
    assert not pool.manager.move_failed(lease.id, "the other server does not answer").actions
    assert pool.manager.lease(lease.id).position == 1
    pool.clock.advance(20)
    assert not pool.manager.tick().actions
    pool.clock.advance(20)
    (action,) = pool.manager.tick().actions
    assert isinstance(action, MoveWorker)


def test_a_parked_lease_moves_without_being_woken(pool: Pool) -> None:
    lease = parked(pool)
    pool.manager.move(lease.id, "because one is drained")
    pool.manager.moved(lease.id, OTHER)
    assert pool.manager.lease(lease.id).state is LeaseState.ACTIVE
    assert pool.granted() == {"one": 32510, "two": 32510, "old": 0}


@pytest.mark.parametrize("has_arrived", [False, True])
def test_a_restart_concludes_where_a_lease_is(pool: Pool, has_arrived: bool) -> None:
    lease = pool.active()
    pool.manager.move(lease.id, "because")
    pool.manager = pool.new_manager()
    pool.manager.set_servers(pool.servers)
    assert pool.granted() == {"one": 16255, "two": 16255, "old": 0}, "both, as long as nobody knows"
    worker = OTHER if has_arrived else WORKER
    pool.manager.recover({lease.id: worker}, (), {lease.id} if has_arrived else ())
    after = pool.manager.lease(lease.id)
    assert (after.state, after.worker, after.moving_to) == (LeaseState.ACTIVE, worker, ())
    assert after.slices[0].server == ("two" if has_arrived else "one")
    assert sum(pool.granted().values()) == 16255
    assert not pool.ledger.verify()


def test_one_without_a_worker_is_lost_on_both_servers(pool: Pool) -> None:
    lease = pool.active()
    pool.manager.move(lease.id, "because")
    pool.manager = pool.new_manager()
    pool.manager.recover({})
    assert pool.manager.lease(lease.id).state is LeaseState.LOST
    assert not pool.ledger.verify()


@pytest.fixture
def spreading(ledger: Ledger, clock: Clock, servers: list[Server]) -> Pool:
    """Two servers with a GPU each, of which the first leases take one each; leases move for others."""
    pool = Pool(ledger, clock, servers[:2])
    pool.manager = Manager(
        ledger,
        clock,
        ttl_s=1000.0,
        policy=SPREAD,
        can_move=lambda lease: True,
        moves_within_server=False,
    )
    pool.manager.set_servers(servers[:2])
    return pool


def test_a_lease_moves_for_one_that_waits_which_starts_once_it_has(spreading: Pool) -> None:
    manager = spreading.manager
    lease, _ = spreading.active(0.3), spreading.active(0.6, server="two")
    assert not manager.make_room().changed, "nobody waits"
    waiting = spreading.request(1.0)
    (action,) = manager.make_room().actions
    assert isinstance(action, MoveWorker) and action.lease.id == lease.id
    assert [piece.server for piece in action.lease.moving_to] == ["two"]
    assert not manager.make_room().changed, "one move is enough"
    later = spreading.request(0.3)
    assert later.state is LeaseState.QUEUED, "what is free is kept"
    manager.moved(lease.id, OTHER)
    assert manager.lease(waiting.id).slices[0].server == "one"
    assert manager.lease(later.id).state is LeaseState.QUEUED
    (entry,) = [outcome for action, outcome in spreading.audit() if action == "move"]
    assert entry == f"to GPU 0 of two: 9753 MiB, for ada's lease {waiting.id}"
    assert not spreading.ledger.verify()


def test_a_move_that_fails_is_not_tried_again_at_once(spreading: Pool) -> None:
    manager = spreading.manager
    lease, _ = spreading.active(0.3), spreading.active(0.6, server="two", never_park=True)
    waiting = spreading.request(1.0)
    assert manager.make_room().actions
    manager.move_failed(lease.id, "no route to host")
    assert manager.lease(lease.id).moving_to == () and manager.lease(waiting.id).state is LeaseState.QUEUED
    assert not manager.make_room().changed


def test_neither_a_lease_that_must_keep_its_gpus_nor_one_of_a_namespace_that_forbids_it_moves(
    spreading: Pool,
) -> None:
    manager = spreading.manager
    spreading.active(0.4, never_park=True), spreading.active(0.5, server="two")
    waiting = spreading.request(1.0)
    edit = {"reclaim": "never"}
    manager.administer(lambda names, tx: names.change(tx, "default", edit, None), Entry(0.0, "", ""))
    assert not manager.make_room().changed
    edit = {"reclaim": None}
    manager.administer(lambda names, tx: names.change(tx, "default", edit, None), Entry(0.0, "", ""))
    (action,) = manager.make_room().actions
    assert isinstance(action, MoveWorker) and action.lease.request.partial == 0.5
    assert manager.lease(waiting.id).state is LeaseState.QUEUED
