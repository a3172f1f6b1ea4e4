"""Who overtakes whom: a reservation's promise, against chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.core.models import Lease, LeaseState, Namespace, Request, Server
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.scheduling import placement
from jupyter_gpupool.pool.scheduling.admission import GrantPlan, plan_grants
from jupyter_gpupool.pool.scheduling.placement_index import Granted, PlacementIndex
from jupyter_gpupool.pool.scheduling.reservation import Share, reserve

POOLS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([700, 1000])), min_size=1, max_size=4).map(
    lambda sizes: [
        Server(f"s{n}", "127.0.0.1", emulated_gpus(f"s{n}", count=count, memory_mib=mib))
        for n, (count, mib) in enumerate(sizes)
    ]
)
REQUESTS = st.builds(
    Request,
    st.just(""),
    st.sampled_from(["ada", "ben"]),
    num_gpus=st.sampled_from([1, 1, 1, 2, 4]),
    partial=st.sampled_from([0.3, 0.5, 1.0]),
    spread=st.booleans(),
    filters=st.sampled_from([{}, {}, {"server": "s0"}]),
    namespace=st.sampled_from(["a", "a", "b"]),
)


class Pool:
    """Leases on servers, as the ledger keeps them. ``step``: grant what a plan grants."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers, self.index = servers, PlacementIndex(servers)
        self.used = Granted({})
        self.held: dict[str, tuple[Any, ...]] = {}
        self.on: dict[str, dict[str, Share]] = defaultdict(dict)
        self.queue: list[Lease] = []

    def leases_on(self, uuid: str) -> dict[str, Share]:
        return self.on[uuid]

    def step(self) -> GrantPlan:
        plan = plan_grants(
            self.queue, self.index, self.used, {}, Namespace, lambda lease: False, self.leases_on
        )
        for lease, slices in plan.granted:
            self.held[lease.id] = slices
            for piece in slices:
                self.used.use(piece.gpu_uuid, piece.memory_mib)
                self.on[piece.gpu_uuid][lease.id] = Share(piece.memory_mib, len(slices))
        self.queue = plan.waiting
        return plan

    def end(self, lease_id: str) -> None:
        for piece in self.held.pop(lease_id):
            self.used.use(piece.gpu_uuid, -piece.memory_mib)
            del self.on[piece.gpu_uuid][lease_id]


@given(servers=POOLS, steps=st.lists(st.one_of(REQUESTS, REQUESTS, st.integers(0, 20)), max_size=25))
def test_who_overtakes_adds_no_lease_to_those_that_the_head_waits_for(
    servers: list[Server], steps: list[Any]
) -> None:
    pool = Pool(servers)
    memory = {gpu.uuid: gpu.memory_mib for server in servers for gpu in server.gpus}
    for number, step in enumerate(steps):
        if isinstance(step, int) and pool.held:
            pool.end(sorted(pool.held)[step % len(pool.held)])
        elif isinstance(step, Request) and placement.impossible(step, servers) is None:
            pool.queue.append(Lease(replace(step, id=f"{number:02}"), LeaseState.QUEUED))
        plan = pool.step()
        assert all(mib <= memory[uuid] for uuid, mib in pool.used.items())
        if not plan.waiting:
            continue
        head = plan.waiting[0]
        kept = plan.reserved[head.id]
        assert placement.place(head.request, servers, dict(pool.used)) is None
        assert kept == reserve(head.request, servers, dict(pool.used), pool.leases_on) or plan.granted
        left = dict(pool.used)
        for lease_id in kept.waits_for:
            for piece in pool.held[lease_id]:
                left[piece.gpu_uuid] -= piece.memory_mib
        early = {lease.id for lease, _ in plan.granted if lease.id < head.id}
        if not early:  # nothing was granted before it in this pass
            assert kept.waits_for and placement.place(head.request, servers, left) is not None


def test_the_index_reserves_as_the_reference_does(ask: Callable[..., Request]) -> None:
    servers = [Server(f"s{n}", "h", emulated_gpus(f"s{n}", count=4, memory_mib=1000)) for n in range(6)]
    pool = Pool(servers)
    for number in range(40):
        wanted = ask(partial=(0.3, 0.5, 1.0)[number % 3], num_gpus=1 + number % 2, id=f"{number:02}")
        pool.queue.append(Lease(wanted, LeaseState.QUEUED))
    pool.step()
    head = ask(num_gpus=4, partial=0.6)
    while pool.held:
        assert pool.index.reserve(head, pool.used, pool.leases_on) == reserve(
            head, servers, dict(pool.used), pool.leases_on
        )
        pool.end(sorted(pool.held)[len(pool.held) // 2])


def test_a_reservation_goes_where_the_fewest_leases_have_to_end(ask: Callable[..., Request]) -> None:
    servers = [Server(f"s{n}", "h", emulated_gpus(f"s{n}", count=2, memory_mib=1000)) for n in range(2)]
    pool = Pool(servers)
    for lease_id, server, count in (("1", "s0", 1), ("2", "s0", 1), ("3", "s1", 2)):
        request = ask(num_gpus=count, filters={"server": server}, id=lease_id)
        pool.queue.append(Lease(request, LeaseState.QUEUED))
        pool.step()
    kept = reserve(ask(num_gpus=2), servers, pool.used, pool.leases_on)
    assert kept is not None and kept.waits_for == {"3"}
    assert not any(kept.blocked_mib.values()), "nothing is free there"
