from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jupyter_gpupool.core.errors import (
    ImpossibleRequest,
    InvalidRequest,
    LeaseEnded,
    NoCapacity,
    RequestConflict,
    UnknownLease,
)
from jupyter_gpupool.core.models import (
    Change,
    Lease,
    LeaseState,
    Request,
    Server,
    StartWorker,
    StopWorker,
    WorkerAddress,
)
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager

Ask = Callable[..., Request]


def granted(change: Change) -> Lease:
    assert change.lease is not None
    assert change.lease.state is LeaseState.GRANTED, change
    return change.lease


def started(change: Change) -> list[str]:
    return [action.lease.id for action in change.actions if isinstance(action, StartWorker)]


def state(manager: Manager, lease_id: str) -> LeaseState:
    return manager.lease(lease_id).state


def used(manager: Manager) -> list[int]:
    return list(manager.snapshot().granted_mib.values())


def test_a_lease_from_request_to_release(
    manager: Manager, ask: Ask, worker: WorkerAddress, clock: Any
) -> None:
    change = manager.request(ask(num_gpus=2, partial=0.8))
    lease = granted(change)
    assert change.actions == (StartWorker(replace(lease, heartbeat_at=lease.created_at)),)
    assert [piece.memory_mib for piece in lease.slices] == [26008, 26008]
    assert (lease.created_at, lease.granted_at, lease.ttl_s) == (clock(), clock(), 15.0)
    assert used(manager) == [26008, 26008]

    active = manager.worker_started(lease.id, worker).lease
    assert active is not None and (active.state, active.worker) == (LeaseState.ACTIVE, worker)

    change = manager.release(lease.id, "ada")
    assert change.actions == (StopWorker(lease.id),)
    assert change.lease is not None and change.lease.state is LeaseState.RELEASED
    assert change.lease.ended_at == clock()
    assert used(manager) == [0, 0]
    assert manager.leases() == []
    assert [old.slices for old in manager.leases(include_ended=True)] == [lease.slices]


def test_two_halves_share_a_gpu_and_a_third_waits_for_one_to_end(manager: Manager, ask: Ask) -> None:
    on_one = {"index": "0"}
    first = granted(manager.request(ask(partial=0.5, filters=on_one)))
    second = granted(manager.request(ask(partial=0.5, filters=on_one)))
    assert first.slices[0].gpu_uuid == second.slices[0].gpu_uuid
    third = manager.request(ask(partial=0.3, filters=on_one)).lease
    assert third is not None and (third.state, third.position) == (LeaseState.QUEUED, 1)

    change = manager.release(first.id, "ada")
    assert [type(action) for action in change.actions] == [StopWorker, StartWorker], "stop before start"
    assert started(change) == [third.id]
    assert {lease.id for lease in change.changed} == {first.id, third.id}
    assert state(manager, third.id) is LeaseState.GRANTED
    assert manager.lease(third.id).position is None


def test_without_waiting_nothing_is_recorded(manager: Manager, ask: Ask) -> None:
    granted(manager.request(ask(num_gpus=2)))
    with pytest.raises(NoCapacity, match="2 GPUs with 0.5 of the memory each cannot be granted now"):
        manager.request(ask(num_gpus=2, partial=0.5, wait=False))
    assert len(manager.leases(include_ended=True)) == 1


def test_impossible_and_senseless_requests_are_refused_and_leave_nothing(manager: Manager, ask: Ask) -> None:
    with pytest.raises(ImpossibleRequest, match="9 GPUs asked for, but the pool has 2"):
        manager.request(ask(num_gpus=9))
    with pytest.raises(InvalidRequest):
        manager.request(ask(partial=1.5))
    assert manager.leases(include_ended=True) == []


def test_repeating_a_request_returns_the_same_lease(manager: Manager, ask: Ask) -> None:
    request = ask(partial=0.4, filters={"index": "1"})
    first = manager.request(request)
    again = manager.request(replace(request, client="after a reconnect"))
    assert again.lease == first.lease and again.actions == ()
    assert used(manager) == [0, 13004]
    manager.release(request.id, "ada")
    over = manager.request(request).lease
    assert over is not None and over.state is LeaseState.RELEASED, (
        "a repeated request does not revive a lease"
    )


@pytest.mark.parametrize(
    "change", [{"partial": 0.5}, {"num_gpus": 2}, {"secret_sha256": "cd" * 32}, {"filters": {"index": "1"}}]
)
def test_the_same_id_for_something_else_is_a_conflict(
    manager: Manager, ask: Ask, change: dict[str, Any]
) -> None:
    request = ask(partial=0.4)
    manager.request(request)
    with pytest.raises(RequestConflict, match="something else"):
        manager.request(replace(request, **change))


def test_a_stranger_learns_nothing_and_can_do_nothing(manager: Manager, ask: Ask) -> None:
    request = ask(partial=0.4, label="secret project")
    manager.request(request)
    with pytest.raises(RequestConflict) as caught:
        manager.request(replace(request, owner="eve"))
    said = str(caught.value).replace(request.id, "")  # an id is random, and "ada" is three hexadecimal digits
    assert "ada" not in said and "secret" not in said
    for call in (manager.heartbeat, manager.release, manager.lease):
        with pytest.raises(UnknownLease) as stranger:
            call(request.id, "eve")
        with pytest.raises(UnknownLease) as nobody:
            call("0c6f6a6e-0000-4000-8000-000000000000", "eve")
        assert str(stranger.value).replace(request.id, "") == str(nobody.value).replace(
            "0c6f6a6e-0000-4000-8000-000000000000", ""
        )
    assert manager.leases(owner="eve") == []
    assert manager.release(request.id, None).actions, "an administrator may"


def test_small_requests_do_not_overtake_in_their_namespace(manager: Manager, ask: Ask) -> None:
    holder = granted(manager.request(ask(partial=0.5, filters={"index": "0"})))
    large = ask(num_gpus=2)
    small = ask(partial=0.1)
    assert manager.request(large).lease.position == 1  # type: ignore[union-attr]
    assert manager.request(small).lease.position == 2  # type: ignore[union-attr]
    with pytest.raises(NoCapacity):
        manager.request(ask(partial=0.1, wait=False))
    change = manager.release(holder.id, "ada")
    assert started(change) == [large.id]
    assert state(manager, small.id) is LeaseState.QUEUED
    assert started(manager.release(large.id, "ada")) == [small.id]


def test_a_small_request_overtakes_only_where_that_does_not_delay_the_head(
    ledger: Ledger, clock: Any, ask: Ask
) -> None:
    manager = Manager(ledger, clock)
    manager.set_servers([Server(name, "h", emulated_gpus(name)) for name in ("a", "b")])
    first, _ = [granted(manager.request(ask(filters={"server": name}))) for name in ("a", "b")]
    both = ask(num_gpus=2)
    manager.request(both)
    small = granted(manager.request(ask()))
    assert small.slices[0].server == "b", "one lease has to end on each; the head waits for the first"
    kept = manager.request(ask(partial=0.1)).lease
    assert kept is not None and kept.position == 2
    assert kept.waits_for == "what is free is kept for a request that came earlier"
    with pytest.raises(
        NoCapacity, match="does not wait: what is free is kept for a request that came earlier"
    ):
        manager.request(ask(partial=0.1, wait=False))
    assert started(manager.release(first.id)) == [both.id]
    assert state(manager, kept.id) is LeaseState.QUEUED and not manager.lease(kept.id).waits_for


def test_idle_gpus_of_a_model_that_few_ask_for_go_first_then_those_of_the_fullest_server(
    ledger: Ledger, clock: Any, ask: Ask
) -> None:
    def server(name: str, model: str) -> Server:
        return Server(name, "h", tuple(replace(gpu, name=model) for gpu in emulated_gpus(name)))

    servers = [server("a", "H100"), server("b", "A10"), server("c", "A10")]
    manager = Manager(ledger, clock)
    manager.set_servers(servers)
    for _ in range(2):
        manager.release(granted(manager.request(ask(filters={"name": "h100"}))).id)
    manager.release(granted(manager.request(ask(filters={"name": "A10"}))).id)
    granted(manager.request(ask(filters={"server": "c"})))
    again = Manager(ledger, clock)
    again.set_servers(servers)
    again.recover({})
    chosen = [granted(again.request(ask())).slices[0] for _ in range(5)]
    assert [piece.server for piece in chosen] == ["c", "b", "b", "a", "a"]


def test_other_namespaces_go_on_and_who_holds_least_goes_first(manager: Manager, ask: Ask) -> None:
    big = granted(manager.request(ask(num_gpus=2, partial=1.0, namespace="greedy")))
    waiting = [ask(partial=1.0, namespace="greedy") for _ in range(3)]
    for request in waiting:
        manager.request(request)
    modest = [ask(partial=1.0, namespace="modest") for _ in range(2)]
    for request in modest:
        manager.request(request)
    order = [lease.id for lease in manager.snapshot().queue]
    assert order == [modest[0].id, modest[1].id, *(request.id for request in waiting)]
    # Now nobody holds anything: who came first starts, and then it is the other's turn.
    assert started(manager.release(big.id, "ada")) == [waiting[0].id, modest[0].id]


def test_a_heartbeat_keeps_a_lease_and_silence_ends_it(manager: Manager, ask: Ask, clock: Any) -> None:
    kept, silent = granted(manager.request(ask(partial=0.5))), granted(manager.request(ask(partial=0.5)))
    queued = ask(num_gpus=2)
    manager.request(queued)
    for _ in range(4):
        clock.advance(5.0)
        beaten = manager.heartbeat(kept.id, "ada").lease
        assert beaten is not None and beaten.heartbeat_at == clock()
    change = manager.tick()
    assert change.actions == (StopWorker(silent.id),)
    over = manager.lease(silent.id)
    assert (over.state, over.reason) == (LeaseState.EXPIRED, "no sign of life from its holder for 15 s")
    assert state(manager, queued.id) is LeaseState.CANCELLED, "those who queue have to show up as well"
    assert state(manager, kept.id) is LeaseState.GRANTED
    assert manager.tick().actions == ()


def test_nothing_revives_a_lease(manager: Manager, ask: Ask, clock: Any, worker: WorkerAddress) -> None:
    lease = granted(manager.request(ask()))
    clock.advance(15.1)
    with pytest.raises(LeaseEnded, match="no sign of life"):
        manager.heartbeat(lease.id, "ada")
    manager.tick()
    with pytest.raises(LeaseEnded, match="EXPIRED"):
        manager.heartbeat(lease.id, "ada")
    assert manager.worker_started(lease.id, worker).actions == (StopWorker(lease.id),)
    assert manager.release(lease.id, "ada").actions == ()
    assert manager.worker_exited(lease.id, LeaseState.LOST, "late").changed == ()
    assert state(manager, lease.id) is LeaseState.EXPIRED


def test_a_worker_that_fails_or_dies_frees_its_share(
    manager: Manager, ask: Ask, worker: WorkerAddress
) -> None:
    failed = granted(manager.request(ask(num_gpus=2)))
    waiting = ask(num_gpus=2)
    manager.request(waiting)
    change = manager.worker_failed(failed.id, "no such program")
    assert change.lease is not None and change.lease.reason == "no such program"
    assert change.lease.state is LeaseState.LOST and started(change) == [waiting.id]
    manager.worker_started(waiting.id, worker)
    change = manager.worker_exited(waiting.id, LeaseState.RELEASED, "its holder went away")
    assert change.lease is not None and change.lease.state is LeaseState.RELEASED and not change.actions
    assert used(manager) == [0, 0]
    with pytest.raises(ValueError, match="ACTIVE is not an end"):
        manager.worker_exited(waiting.id, LeaseState.ACTIVE, "")
    assert manager.worker_exited("0c6f6a6e-0000-4000-8000-000000000000", LeaseState.LOST, "") == Change()


def test_a_worker_that_is_replaced_leaves_its_lease_as_it_is(
    manager: Manager, ask: Ask, worker: WorkerAddress
) -> None:
    lease = manager.request(ask()).lease
    manager.worker_started(lease.id, worker)
    successor = WorkerAddress("127.0.0.1", worker.port, 77, 8.0)
    change = manager.worker_replaced(lease.id, successor, "its worker was killed by SIGSEGV")
    (now,) = change.changed
    assert now.state is LeaseState.ACTIVE and now.worker == successor and change.actions == ()
    assert manager.lease(lease.id) == now
    manager.release(lease.id)
    assert manager.worker_replaced(lease.id, worker, "late").actions == (StopWorker(lease.id),)


def test_a_grant_whose_worker_never_comes_up_expires(
    ledger: Ledger, servers: Any, ask: Ask, clock: Any
) -> None:
    manager = Manager(ledger, clock, ttl_s=1000.0, attach_timeout_s=30.0)
    manager.set_servers(servers)
    lease = granted(manager.request(ask()))
    clock.advance(30.1)
    assert manager.tick().actions == (StopWorker(lease.id),)
    assert manager.lease(lease.id).reason == "its worker did not come up within 30 s"


def test_who_is_silent_in_the_queue_is_passed_over(manager: Manager, ask: Ask, clock: Any) -> None:
    holder = granted(manager.request(ask(num_gpus=2)))
    silent, patient = ask(num_gpus=2), ask(num_gpus=2)
    manager.request(silent)
    manager.request(patient)
    clock.advance(10.0)
    manager.heartbeat(patient.id)
    clock.advance(10.0)
    assert started(manager.release(holder.id)) == [patient.id]
    assert [lease.id for lease in manager.tick().changed] == [silent.id]


def test_setting_the_clock_expires_nobody(ledger: Ledger, servers: Any, ask: Ask, clock: Any) -> None:
    manager = Manager(ledger, clock, monotonic=lambda: 5.0)
    manager.set_servers(servers)
    lease = granted(manager.request(ask()))
    clock.advance(86400.0)
    assert manager.tick() == Change()
    manager.heartbeat(lease.id)


def test_a_restart_finds_its_workers_or_reaps_them(
    manager: Manager, ledger: Ledger, servers: Any, ask: Ask, clock: Any, worker: WorkerAddress
) -> None:
    found, lost, fresh, late = (granted(manager.request(ask(partial=0.5))) for _ in range(4))
    queued = ask(partial=0.5)
    manager.request(queued)
    for lease in (found, lost):
        manager.worker_started(lease.id, worker)
    clock.advance(3600.0)

    again = Manager(ledger, clock)
    assert again.set_servers(servers).actions == ()
    stray = "0c6f6a6e-0000-4000-8000-000000000000"
    change = again.recover({found.id: worker, late.id: worker, stray: worker})
    assert state(again, found.id) is LeaseState.ACTIVE
    assert again.lease(lost.id).reason == "its worker did not outlive a restart of the pool"
    assert state(again, lost.id) is LeaseState.LOST
    assert state(again, late.id) is LeaseState.ACTIVE
    assert started(change) == [fresh.id, queued.id], (
        "a grant is taken up again, and what was lost is granted anew"
    )
    assert StopWorker(stray) in change.actions
    assert again.tick().changed == (), "everybody has one TTL to be heard again"
    clock.advance(15.1)
    assert {lease.id for lease in again.tick().changed} == {found.id, fresh.id, late.id, queued.id}


def test_nothing_is_granted_before_the_survivors_are_known(
    manager: Manager, ledger: Ledger, servers: Any, ask: Ask, clock: Any
) -> None:
    manager.request(ask(partial=0.5))
    again = Manager(ledger, clock)
    again.set_servers(servers)
    with pytest.raises(NoCapacity, match="is restarting"):
        again.request(ask(partial=0.1, wait=False))
    early = ask(partial=0.1)
    lease = again.request(early).lease
    assert lease is not None and (lease.state, lease.position) == (LeaseState.QUEUED, 1)
    assert early.id in started(again.recover({}))


def test_gpus_come_and_go(manager: Manager, servers: Any, ask: Ask) -> None:
    lease = granted(manager.request(ask(filters={"index": "1"})))
    one = [Server("one", "127.0.0.1", servers[0].gpus[:1])]
    manager.set_servers(one)
    with pytest.raises(ImpossibleRequest):
        manager.request(ask(num_gpus=2))
    assert state(manager, lease.id) is LeaseState.GRANTED
    holder = granted(manager.request(ask()))
    manager.set_servers(servers)
    blocked = ask(num_gpus=2)
    manager.request(blocked)
    manager.set_servers(one)
    behind = ask(partial=0.5)
    manager.request(behind)
    assert started(manager.release(holder.id)) == [behind.id], (
        "nobody waits behind what no server could grant"
    )
    manager.release(behind.id)
    manager.release(lease.id)
    assert started(manager.set_servers(servers)) == [blocked.id], "it kept its place"


def test_a_gpu_that_comes_back_smaller_keeps_what_was_granted(manager: Manager, ask: Ask) -> None:
    lease = granted(manager.request(ask(partial=0.9)))
    manager.set_servers([Server("one", "127.0.0.1", emulated_gpus("one", count=1, memory_mib=16000))])
    assert state(manager, lease.id) is LeaseState.GRANTED
    waiting = ask(memory_mib=16000)
    manager.request(waiting)
    assert started(manager.release(lease.id)) == [waiting.id]


def test_history_is_kept_for_a_while(ledger: Ledger, servers: Any, ask: Ask, clock: Any) -> None:
    manager = Manager(ledger, clock, ttl_s=1e9, attach_timeout_s=1e9, history_s=10_000.0)
    manager.set_servers(servers)
    old, live = granted(manager.request(ask(partial=0.2))), granted(manager.request(ask(partial=0.2)))
    manager.release(old.id)
    clock.advance(9_000.0)
    manager.tick()
    assert len(manager.leases(include_ended=True)) == 2
    clock.advance(9_000.0)
    manager.tick()
    assert [lease.id for lease in manager.leases(include_ended=True)] == [live.id]


def test_leases_can_be_limited_to_the_newest(manager: Manager, ask: Ask) -> None:
    ids = [granted(manager.request(ask(partial=0.1))).id for _ in range(5)]
    assert [lease.id for lease in manager.leases(newest=2)] == ids[-2:]


def test_json_of_a_lease_holds_no_digest(manager: Manager, ask: Ask) -> None:
    lease = granted(manager.request(ask()))
    assert "ab" * 32 not in str(lease.to_json())


class TestForecast:
    def test_says_what_a_request_would_become_and_records_nothing(self, manager: Manager, ask: Ask) -> None:
        first = manager.forecast(ask(num_gpus=2, partial=0.8))
        assert (first.state, [s.memory_mib for s in first.slices]) == (LeaseState.GRANTED, [26008, 26008])
        assert manager.leases(include_ended=True) == [] and used(manager) == [0, 0]
        granted(manager.request(ask(num_gpus=2, partial=0.8)))
        manager.request(ask(num_gpus=2, partial=0.5))
        # There is room for both of these, but the first request in the queue needs what the second would take.
        assert manager.forecast(ask(partial=0.1)).state is LeaseState.GRANTED
        waiting = manager.forecast(ask(partial=0.2, num_gpus=2))
        assert (waiting.state, waiting.position) == (LeaseState.GRANTED, None)
        assert len(manager.leases()) == 2

    def test_refuses_what_a_request_would_be_refused_for(self, manager: Manager, ask: Ask) -> None:
        with pytest.raises(ImpossibleRequest, match="3 GPUs asked for, but the pool has 2"):
            manager.forecast(ask(num_gpus=3, partial=0.5))
        with pytest.raises(InvalidRequest):
            manager.forecast(ask(num_gpus=1, partial=1.5))


def test_a_lease_on_several_servers_is_read_again_as_it_was(
    ledger: Ledger, db_url: str, clock: Any, ask: Ask, worker: WorkerAddress
) -> None:
    manager = Manager(ledger, clock)
    manager.set_servers([Server(name, "h", emulated_gpus(name)) for name in ("b", "a")])
    request = ask(num_gpus=3, spread=True, partial=0.5)
    manager.request(request)
    workers = replace(worker, elsewhere={"b": replace(worker, port=4712)})
    manager.worker_started(request.id, workers)
    assert ledger.verify() == ""
    other = Ledger(db_url)
    again = Manager(other, clock).lease(request.id)
    other.close()
    assert (again.request, again.worker) == (request, workers)
    assert again.slices == manager.lease(request.id).slices
    assert [(piece.server, piece.index) for piece in again.slices] == [("a", 0), ("b", 0), ("b", 1)]
    assert [workers.on(piece.server).port for piece in again.slices] == [4711, 4712, 4712]
