"""The pool against chance: random requests, heartbeats, deaths and restarts, its promises checked after each.

The machine keeps a model of its own: what it was told about each lease, and which workers live. It
never asks the manager what to expect.
"""

from __future__ import annotations

import tempfile
import uuid
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from jupyter_gpupool.core.engine import WorkerState
from jupyter_gpupool.core.errors import ImpossibleRequest, LeaseEnded, NoCapacity, PoolError, RequestConflict
from jupyter_gpupool.core.models import (
    Change,
    Lease,
    LeaseState,
    MoveWorker,
    Reclaim,
    Request,
    ResumeWorker,
    Server,
    Slice,
    Snapshot,
    StartWorker,
    StopWorker,
    WorkerAddress,
)
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.lease_transitions import find_transition
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.reclaim import ReclaimPolicy
from jupyter_gpupool.pool.scheduling import resumption
from jupyter_gpupool.pool.scheduling.placement import impossible, place

from ..conftest import often

TTL = 15.0
ATTACH = 40.0
IDLE = 5.0
HOST_MIB = 200
SERVERS = [
    Server("one", "127.0.0.1", emulated_gpus("one", count=2, memory_mib=1000)),
    Server("two", "127.0.0.1", emulated_gpus("two", count=1, memory_mib=700)),
    Server("three", "127.0.0.1", emulated_gpus("three", count=1, memory_mib=1000)),
]
MEMORY = {gpu.uuid: gpu.memory_mib for server in SERVERS for gpu in server.gpus}


def wish(size: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {**others, **size}


# Few sizes, large ones among them: a pool is interesting when it is full.
wishes = st.builds(
    wish,
    st.one_of(
        st.sampled_from([0.3, 0.5, 0.8, 1.0]).map(lambda p: {"partial": p}),
        st.sampled_from([1, 250, 701]).map(lambda m: {"memory_mib": m}),
    ),
    num_gpus=st.sampled_from([1, 1, 1, 2, 3]),
    filters=st.sampled_from([{}, {}, {"server": "one"}, {"server": "two"}, {"index": "1"}]),
    spread=st.sampled_from([False, True]),
    namespace=st.sampled_from(["a", "b"]),
    wait=st.sampled_from([True, True, True, False]),
)


class RecordedManager:
    """A manager; each lease that a call changes must make a transition of the table. ``states``: by lease id."""

    def __init__(self, manager: Manager, states: dict[str, LeaseState]) -> None:
        self._manager = manager
        self._states = states

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._manager, name)
        if not callable(method):
            return method

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            for lease in result.changed if isinstance(result, Change) else ():
                before = self._states.get(lease.id)
                self._states[lease.id] = lease.state
                if before is not lease.state:
                    transition = find_transition(before, lease.state)
                    assert transition is not None, f"{before} -> {lease.state} by {name}"
                    assert name in transition.calls, f"{before} -> {lease.state} by {name}"
            return result

        return recorded


class Life(RuleBasedStateMachine):
    ids = Bundle("ids")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="gpupool-life-")
        self.url = f"sqlite:///{Path(self.folder.name) / 'ledger.sqlite'}"
        self.now = 1000.0
        self.requests: dict[str, Request] = {}
        self.beats: dict[str, float] = {}
        self.ended: dict[str, Lease] = {}
        self.slices: dict[str, Any] = {}
        self.starting: set[str] = set()
        self.workers: dict[str, WorkerAddress] = {}
        self.parked: dict[str, int] = {}  # the workers whose state is in host memory, with its MiB
        self.woken: list[str] = []
        self.moving: dict[str, tuple[Slice, ...]] = {}
        self.computed: dict[str, float] = {}
        self.order: dict[str, list[str]] = defaultdict(list)
        self.port = 0
        self.ledger = Ledger(self.url)
        self.states: dict[str, LeaseState] = {}
        self.manager = self.new_manager()
        self.carry_out(self.manager.set_servers(SERVERS))

    def new_manager(self) -> Any:
        reclaim = ReclaimPolicy(Reclaim.IDLE, IDLE, min_resident_s=0.0)
        manager = Manager(
            self.ledger, lambda: self.now, TTL, attach_timeout_s=ATTACH, reclaim=reclaim, may_move=True
        )
        return RecordedManager(manager, self.states)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    def carry_out(self, change: Change) -> None:
        """What a service does with a change: worker processes come and go."""
        stopped = False
        for action in change.actions:
            if isinstance(action, StopWorker):
                assert not stopped, "stops come before starts"
                self.workers.pop(action.lease_id, None)
                self.starting.discard(action.lease_id)
                self.end_parked(action.lease_id)
                self.moving.pop(action.lease_id, None)
            if isinstance(action, MoveWorker):
                stopped = True
                lease = action.lease
                assert lease.id in self.workers and lease.id not in self.moving and lease.moving_to
                left, *others = {s.server for s in lease.leaving}
                assert not others, "a part that is on one server leaves it as a whole"
                assert left not in {s.server for s in lease.moving_to}
                assert {s.server for s in lease.arriving}.isdisjoint(s.server for s in lease.slices)
                assert [(s.name, s.memory_mib) for s in lease.moving_to] == [
                    (s.name, s.memory_mib) for s in lease.slices
                ]
                self.moving[lease.id] = lease.moving_to
                if lease.id in self.woken:
                    self.woken.remove(lease.id)
            if isinstance(action, ResumeWorker):
                stopped = True
                lease = action.lease
                assert (
                    lease.state is LeaseState.ACTIVE and lease.id in self.parked and lease.id in self.workers
                )
                assert lease.id in self.woken, "nobody wakes a lease but its own program"
                before = self.slices[lease.id]
                assert [(s.name, s.server, s.memory_mib) for s in lease.slices] == [
                    (s.name, s.server, s.memory_mib) for s in before
                ]
                self.slices[lease.id] = lease.slices
                self.woken.remove(lease.id)
                del self.parked[lease.id]
                self.computed[lease.id] = self.now
            if isinstance(action, StartWorker):
                stopped = True
                assert action.lease.state is LeaseState.GRANTED and action.lease.slices
                assert action.lease.id not in self.workers, "a lease never has two workers"
                self.starting.add(action.lease.id)

    # -- what other machines have otherwise --------------------------------------------------------

    def owner_of(self, namespace: str) -> str:
        return f"user-{namespace}"

    def never(self, request: Request) -> str | None:
        return impossible(request, SERVERS)

    def limited(self, lease: Lease, wanted: list[int]) -> bool:
        """Whether a limit forbids that much of each of its GPUs."""
        return False

    # -- users ------------------------------------------------------------------------------------

    @rule(target=ids, wanted=st.lists(wishes, min_size=1, max_size=6))
    def request(self, wanted: list[dict[str, Any]]) -> Any:
        return multiple(*(self.request_one(**wish) for wish in wanted))

    def request_one(self, namespace: str, **wish: Any) -> str:
        request = Request(
            id=str(uuid.uuid5(uuid.NAMESPACE_OID, str(len(self.requests)))),
            owner=self.owner_of(namespace),
            namespace=namespace,
            secret_sha256="0" * 64,
            **wish,
        )
        self.requests[request.id] = request
        before = self.manager.snapshot()
        try:
            change = self.manager.request(request)
        except (NoCapacity, ImpossibleRequest) as error:
            assert (self.never(request) is not None) == isinstance(error, ImpossibleRequest)
            assert request.wait is False or isinstance(error, ImpossibleRequest)
            assert self.manager.snapshot() == before, "a refused request leaves nothing"
            return request.id
        assert change.lease is not None
        assert request.wait or change.lease.state is LeaseState.GRANTED, "who would not wait does not queue"
        self.beats[request.id] = self.now
        self.order[namespace].append(request.id)
        self.carry_out(change)
        self.promises()
        return request.id

    @rule(lease=ids)
    def repeat(self, lease: str) -> None:
        if lease not in self.beats:
            return
        before = self.manager.snapshot()
        change = self.manager.request(self.requests[lease])
        assert change.lease == self.manager.lease(lease) and not change.actions
        with pytest.raises(RequestConflict):
            self.manager.request(replace(self.requests[lease], owner="eve"))
        assert self.manager.snapshot() == before

    @rule(lease=ids)
    def heartbeat(self, lease: str) -> None:
        if lease not in self.beats:
            return
        try:
            self.manager.heartbeat(lease, self.requests[lease].owner)
        except LeaseEnded:
            assert lease in self.ended or self.now - self.beats[lease] > TTL, "a living lease was refused"
        else:
            assert lease not in self.ended and self.now - self.beats[lease] <= TTL, "revived"
            self.beats[lease] = self.now

    @precondition(lambda self: self.beats.keys() - self.ended.keys())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.beats.keys() - self.ended.keys())))
        self.carry_out(self.manager.release(lease, self.requests[lease].owner))
        assert self.manager.lease(lease).state.ended

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), size=st.sampled_from([{"partial": 0.2}, {"partial": 1.0}, {"memory_mib": 300}]))
    def resize(self, data: st.DataObject, size: dict[str, Any]) -> None:
        id = data.draw(st.sampled_from(sorted(self.slices)))
        before, snapshot = self.manager.lease(id), self.manager.snapshot()
        wanted = [
            size.get("memory_mib") or int(size["partial"] * piece.total_mib + 1e-6) for piece in before.slices
        ]
        free = {gpu: MEMORY[gpu] - mib for gpu, mib in snapshot.granted_mib.items()}
        try:
            change = self.manager.resize(id, size.get("partial"), size.get("memory_mib"))
        except PoolError as error:
            assert not isinstance(error, LeaseEnded) or before.state.ended
            if before.state is LeaseState.ACTIVE and not before.moving_to:
                assert self.limited(before, wanted) or any(
                    mib > piece.total_mib or mib - piece.memory_mib > free[piece.gpu_uuid]
                    for mib, piece in zip(wanted, before.slices)
                ), "what fits was refused"
            assert self.manager.snapshot() == snapshot, "a refusal changes nothing"
            return
        assert before.state is LeaseState.ACTIVE and change.lease is not None
        assert [piece.memory_mib for piece in change.lease.slices] == wanted
        assert [piece.gpu_uuid for piece in change.lease.slices] == [p.gpu_uuid for p in before.slices]
        self.slices[id] = change.lease.slices
        self.carry_out(change)

    @rule(lease=ids)
    def release_again(self, lease: str) -> None:
        if lease in self.ended:
            assert self.manager.release(lease).lease == self.ended[lease]

    # -- time -------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 5.0, 14.0]), silent=st.sampled_from([0, 0, 0, 2, 3]))
    def wait(self, seconds: float, silent: int) -> None:
        """Time passes while holders show up: all of them, or all but each second or third."""
        self.now += seconds
        for number, lease in enumerate(list(self.beats)):
            if not silent or number % silent:
                self.heartbeat(lease)

    @rule()
    def long_silence(self) -> None:
        self.now += TTL + 1.0

    @rule()
    def tick(self) -> None:
        self.carry_out(self.manager.tick())
        for lease in self.manager.leases():
            assert self.now - self.beats[lease.id] <= TTL, "a silent lease outlived a tick"

    def new_worker(self, lease: str) -> WorkerAddress:
        """On each server of which the lease has slices."""

        def one() -> WorkerAddress:
            self.port += 1
            return WorkerAddress("127.0.0.1", self.port, 100 + self.port, self.now)

        first, *others = dict.fromkeys(piece.server for piece in self.slices[lease])
        return replace(one(), elsewhere={server: one() for server in others})

    # -- workers ----------------------------------------------------------------------------------

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def worker_starts(self, data: st.DataObject) -> None:
        self.start_one(data.draw(st.sampled_from(sorted(self.starting))))

    def start_one(self, lease: str) -> None:
        self.starting.discard(lease)
        self.workers[lease] = self.new_worker(lease)
        self.carry_out(self.manager.worker_started(lease, self.workers[lease]))

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def worker_does_not_start(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.discard(lease)
        self.carry_out(self.manager.worker_failed(lease, "it did not start"))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), state=st.sampled_from([LeaseState.LOST, LeaseState.RELEASED, LeaseState.EXPIRED]))
    def worker_ends(self, data: st.DataObject, state: LeaseState) -> None:
        lease = data.draw(st.sampled_from(sorted(self.workers)))
        self.workers.pop(lease)
        self.end_parked(lease)
        self.moving.pop(lease, None)
        self.carry_out(self.manager.worker_exited(lease, state, "it ended"))
        assert self.manager.lease(lease).state.ended

    @precondition(lambda self: set(self.workers) - set(self.parked))
    @rule(data=st.data())
    def worker_is_replaced(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(set(self.workers) - set(self.parked))))
        before = self.manager.lease(lease)
        self.workers[lease] = self.new_worker(lease)
        self.carry_out(self.manager.worker_replaced(lease, self.workers[lease], "it crashed"))
        now = self.manager.lease(lease)
        assert (now.state, now.slices, now.worker) == (before.state, before.slices, self.workers[lease])

    @rule(lease=ids)
    def a_late_worker_must_go(self, lease: str) -> None:
        if lease in self.ended:
            change = self.manager.worker_started(lease, WorkerAddress("127.0.0.1", 1, 1, 1.0))
            assert change.actions == (StopWorker(lease),)

    def end_parked(self, lease: str) -> None:
        if self.parked.pop(lease, None) is not None and lease in self.woken:
            self.woken.remove(lease)

    # -- parking ----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([IDLE, IDLE, 1.0]), fails=st.sampled_from([False, False, False, True]))
    def park_for_others(self, seconds: float, fails: bool) -> None:
        """Workers have been idle for a while, and the engine parks those that the pool asks for."""
        for lease in sorted(self.starting):
            self.start_one(lease)
        self.now += seconds
        for lease in list(self.beats):
            self.heartbeat(lease)
        states = {
            lease: WorkerState(100, by_server=self.host_mib(lease))
            for lease in self.workers
            if lease not in self.parked and lease not in self.moving
        }
        parks = self.manager.find_parks(states, {server.name: HOST_MIB for server in SERVERS})
        if parks is None:
            return
        before = self.manager.snapshot()
        for lease in parks.leases:
            assert lease.state is LeaseState.ACTIVE and lease.id not in self.parked
            assert self.now - self.computed.get(lease.id, 0.0) >= IDLE, "one that computes is left alone"
        for server in SERVERS:
            kept = (*self.parked, *(lease.id for lease in parks.leases))
            assert sum(self.host_mib(lease).get(server.name, 0) for lease in kept) <= HOST_MIB
        if fails:  # the engine could not, and has undone what it did
            assert self.manager.snapshot() == before
            return
        for lease in parks.leases:
            self.parked[lease.id] = 100
        change = self.manager.park(parks, dict.fromkeys((lease.id for lease in parks.leases), 100))
        self.carry_out(change)
        after = self.manager.lease(parks.waiting.id)
        assert after.state in (LeaseState.GRANTED, LeaseState.ACTIVE), (
            "the plan made room for the one that waited"
        )

    def host_mib(self, lease: str) -> dict[str, int]:
        """What it takes of each server's host memory while it is parked: 100 MiB, in equal parts."""
        there = {piece.server for piece in self.slices[lease]}
        return dict.fromkeys(there, 100 // len(there))

    @precondition(lambda self: self.parked)
    @rule(data=st.data(), again=st.booleans())
    def wake(self, data: st.DataObject, again: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.parked)))
        if lease not in self.woken and lease not in self.moving:
            self.woken.append(lease)
        for _ in range(1 + again):
            self.now += 0.001  # nobody waits as long as somebody else
            self.carry_out(self.manager.wake(lease))

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        computing = [lease for lease in sorted(self.workers) if lease not in self.parked]
        some = data.draw(st.lists(st.sampled_from(computing))) if computing else []
        self.manager.computing(some)
        self.computed.update(dict.fromkeys(some, self.now))

    # -- moving -----------------------------------------------------------------------------------

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.workers)))
        before = self.manager.snapshot()
        try:
            leaving = data.draw(st.sampled_from(sorted({piece.server for piece in self.slices[lease]})))
            self.carry_out(self.manager.move(lease, "because it is told to", leaving=leaving))
        except NoCapacity:
            assert self.manager.snapshot() == before
        else:
            assert self.manager.lease(lease).moving_to == self.moving[lease]

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), fails=st.booleans())
    def move_ends(self, data: st.DataObject, fails: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.moving)))
        slices = self.moving.pop(lease)
        if fails:
            before = self.manager.lease(lease)
            if before.parked is not None and before.parked.wanted_since is not None:
                self.woken_again(lease)
            self.carry_out(self.manager.move_failed(lease, "it did not work"))
            return
        self.parked.pop(lease, None)
        self.slices[lease] = slices
        self.workers[lease] = self.new_worker(lease)
        self.carry_out(self.manager.moved(lease, self.workers[lease], "quickly"))
        assert self.manager.lease(lease).slices == slices

    def woken_again(self, lease: str) -> None:
        """It waits at the place that it had: those that waited longer are before it."""
        since = {
            other.id: other.parked.wanted_since
            for other in self.manager.leases()
            if other.parked is not None and other.parked.wanted_since is not None
        }
        self.woken = sorted([*self.woken, lease], key=lambda one: since[one])

    # -- the pool dies ----------------------------------------------------------------------------

    @rule(data=st.data(), servers_first=st.booleans())
    def restart(self, data: st.DataObject, servers_first: bool) -> None:
        """Workers may or may not outlive it, and may have come up without anybody writing it down."""
        for lease in sorted(self.starting):
            if data.draw(st.booleans()):
                self.workers[lease] = self.new_worker(lease)
        self.starting.clear()
        self.workers = {lease: worker for lease, worker in self.workers.items() if data.draw(st.booleans())}
        self.ledger.close()
        self.ledger = Ledger(self.url)
        self.manager = self.new_manager()
        if servers_first:
            self.carry_out(self.manager.set_servers(SERVERS))
        before = {lease.id: lease for lease in self.manager.leases()}
        self.parked = {lease: mib for lease, mib in self.parked.items() if lease in self.workers}
        active = [id for id in before if before[id].state is LeaseState.ACTIVE and id in self.workers]
        if active and data.draw(st.booleans()):
            self.parked[active[0]] = 0  # the pool died before it wrote that down
        self.woken = [lease for lease in self.woken if lease in self.parked]
        arrived = {lease for lease in self.moving if lease in self.workers and data.draw(st.booleans())}
        for lease, slices in self.moving.items():
            if lease in arrived:  # the pool died before it wrote that down
                self.parked.pop(lease, None)
                self.slices[lease] = slices
                self.workers[lease] = self.new_worker(lease)
            elif lease in self.parked and before[lease].parked.wanted_since is not None:
                self.woken_again(lease)
        self.moving.clear()
        self.carry_out(self.manager.recover(dict(self.workers), set(self.parked), arrived))
        if not servers_first:
            self.carry_out(self.manager.set_servers(SERVERS))
        for lease in before.values():
            if lease.id in self.workers and lease.state.holds:
                state = LeaseState.PARKED if lease.id in self.parked else LeaseState.ACTIVE
                assert self.manager.lease(lease.id).state is state, "its worker lives"
            elif lease.state in (LeaseState.ACTIVE, LeaseState.PARKED) and lease.id not in self.workers:
                assert self.manager.lease(lease.id).state is LeaseState.LOST
        for lease in self.beats:
            self.beats[lease] = self.now  # one TTL of grace

    # -- what must always be true -----------------------------------------------------------------

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "manager"):
            return
        everything = {lease.id: lease for lease in self.manager.leases(include_ended=True)}
        assert set(everything) == set(self.beats), "no request is lost, none appears"
        snapshot = self.manager.snapshot()
        sums: dict[str, int] = dict.fromkeys(MEMORY, 0)
        for lease in everything.values():
            if lease.state.holds:
                assert len({piece.gpu_uuid for piece in lease.slices}) == lease.request.num_gpus
                assert lease.request.spread or len({piece.server for piece in lease.slices}) == 1
                assert lease.parked is None
                if lease.state is LeaseState.ACTIVE:
                    assert lease.worker == self.workers[lease.id], "every one of its workers is known"
                for piece in lease.slices:
                    sums[piece.gpu_uuid] += piece.memory_mib
            for piece in lease.moving_to:
                if not lease.state.holds or piece not in lease.slices:
                    sums[piece.gpu_uuid] += piece.memory_mib
            assert lease.moving_to == self.moving.get(lease.id, ()), "both, for as long as it is moved"
        for gpu, total in sums.items():
            assert total <= MEMORY[gpu], "more was granted than there is"
        assert dict(snapshot.granted_mib) == sums, "what is counted is what is held"

        for lease in everything.values():
            if lease.id in self.ended:
                assert lease == self.ended[lease.id], "what has ended stays as it was"
            elif lease.state.ended:
                assert lease.ended_at == self.now and lease.reason
                self.ended[lease.id] = lease
            if lease.id in self.slices:
                assert lease.slices == self.slices[lease.id], "only who was parked is moved"
            elif lease.slices:
                self.slices[lease.id] = lease.slices

        holding = {lease.id for lease in everything.values() if lease.state.has_worker}
        parked = {lease.id for lease in everything.values() if lease.state is LeaseState.PARKED}
        assert parked == set(self.parked), "what is parked has no share, and nothing else is"
        woken = [lease.id for lease in snapshot.queue if lease.state is LeaseState.PARKED]
        assert woken == self.woken == [lease.id for lease in snapshot.queue[: len(woken)]], "they go first"
        assert set(self.workers) | self.starting <= holding, "no worker without its lease"
        assert holding <= set(self.workers) | self.starting, "a share is granted, but nothing will use it"
        for lease in everything.values():
            assert (lease.state in (LeaseState.ACTIVE, LeaseState.PARKED)) == (
                lease.id in self.workers and lease.id in holding
            )

        assert [lease.position for lease in snapshot.queue] == list(range(1, len(snapshot.queue) + 1))
        self.fair(everything, snapshot)

    def fair(self, everything: dict[str, Lease], snapshot: Snapshot) -> None:
        for namespace, order in self.order.items():
            live = [everything[i] for i in order if not everything[i].state.ended]
            queued = [lease.id for lease in live if lease.state is LeaseState.QUEUED]
            seen = [
                lease.id
                for lease in snapshot.queue
                if lease.request.namespace == namespace and lease.state is LeaseState.QUEUED
            ]
            assert seen == queued, "first come, first served"
        heard = [lease for lease in snapshot.queue if self.now - self.beats[lease.id] <= TTL]
        if heard and heard[0] == snapshot.queue[0]:  # behind a silent one it may take a tick
            first, used = heard[0], snapshot.granted_mib
            fits = (
                resumption.place(first, SERVERS, used)
                if first.parked
                else place(first.request, SERVERS, used)
            )
            assert fits is None, "what fits is not left waiting"


Life.TestCase.settings = settings(
    max_examples=often(40, 1000),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLife = pytest.mark.soak(Life.TestCase)
