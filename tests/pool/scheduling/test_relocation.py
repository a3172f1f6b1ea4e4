"""Leases that move for one that waits: the moves are possible, allowed and make room, and no fewer would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, product

from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.core.models import GPU, Lease, LeaseState, Request, Server, Slice
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.scheduling import placement
from jupyter_gpupool.pool.scheduling.placement_index import Granted, PlacementIndex
from jupyter_gpupool.pool.scheduling.relocation import FreeRoom, has_one_shape
from jupyter_gpupool.pool.scheduling.reservation import Movable, Reservation, Share, reserve

MIB = 100


def server(name: str, count: int, model: str = "V100", draining: bool = False) -> Server:
    gpus = tuple(replace(gpu, name=model) for gpu in emulated_gpus(name, count=count, memory_mib=MIB))
    return Server(name, "127.0.0.1", gpus, draining)


@dataclass
class Pool:
    """Servers with leases that run there. ``fixed``: the ids of those that cannot move."""

    servers: list[Server]
    leases: dict[str, Lease] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    used: Granted = field(default_factory=lambda: Granted({}))

    def add(self, gpus: list[GPU], share: int, **filters: str) -> Lease:
        request = Request(f"{len(self.leases):02}", "ada", len(gpus), memory_mib=share, filters=filters)
        lease = Lease(request, LeaseState.ACTIVE, placement.slices(request, gpus))
        self.leases[lease.id] = lease
        for piece in lease.slices:
            self.used.use(piece.gpu_uuid, piece.memory_mib)
        return lease

    def free(self) -> Iterator[GPU]:
        return (gpu for one in self.servers for gpu in one.gpus)

    def on(self, uuid: str) -> Mapping[str, Share]:
        return {
            lease.id: Share(piece.memory_mib, len(lease.slices))
            for lease in self.leases.values()
            for piece in (*lease.slices, *lease.moving_to)
            if piece.gpu_uuid == uuid
        }

    def movable(self, lease_id: str) -> Lease | None:
        return None if lease_id in self.fixed else self.leases[lease_id]

    def reserve(self, request: Request) -> Reservation | None:
        return reserve(request, self.servers, self.used, self.on, Movable(self.movable))

    def after(self, moves: Mapping[str, tuple[Slice, ...]]) -> dict[str, int]:
        """What is granted of each GPU once the moves are over."""
        used = dict(self.used)
        for lease_id, pieces in moves.items():
            for piece in self.leases[lease_id].slices:
                used[piece.gpu_uuid] -= piece.memory_mib
            for piece in pieces:
                used[piece.gpu_uuid] = used.get(piece.gpu_uuid, 0) + piece.memory_mib
        return used

    def ways(self, lease: Lease) -> list[tuple[Slice, ...]]:
        """Every place where the lease may go."""
        found = []
        for one in self.servers:
            gpus = [
                gpu
                for gpu in one.gpus
                if gpu.name == lease.slices[0].name
                and not one.draining
                and placement.matches(lease.request, gpu)
                and all(piece.gpu_uuid != gpu.uuid for piece in lease.slices)
            ]
            found += [placement.slices(lease.request, some) for some in combinations(gpus, len(lease.slices))]
        return found


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    servers = [
        server(f"s{n}", draw(st.integers(1, 3)), draw(st.sampled_from(("V100", "V100", "T4"))))
        for n in range(draw(st.integers(1, 3)))
    ]
    servers[-1] = replace(servers[-1], draining=draw(st.booleans()))
    pool = Pool(servers)
    for _ in range(draw(st.integers(0, 6))):
        on = draw(st.sampled_from(servers)).gpus
        some = draw(st.lists(st.sampled_from(on), min_size=1, max_size=2, unique_by=lambda gpu: gpu.uuid))
        share = draw(st.sampled_from((30, 50, 100)))
        if all(pool.used.get(gpu.uuid, 0) + share <= MIB for gpu in some):
            lease = pool.add(some, share, **draw(st.sampled_from(({}, {}, {"index": "0"}))))
            if not draw(st.integers(0, 3)):
                pool.fixed.add(lease.id)
    return pool


REQUESTS = st.builds(
    Request,
    st.just("head"),
    st.just("ben"),
    num_gpus=st.integers(1, 3),
    memory_mib=st.sampled_from((30, 60, 100)),
    filters=st.sampled_from(({}, {}, {"name": "T4"})),
    spread=st.booleans(),
)


@given(pools(), REQUESTS)
def test_moves_are_possible_all_at_once_allowed_and_make_room(pool: Pool, request: Request) -> None:
    kept = pool.reserve(request)
    if kept is None or placement.place(request, pool.servers, pool.used) is not None:
        return
    both = dict(pool.used)  # while they move, leases have both places
    for lease_id, pieces in kept.moves.items():
        lease = pool.leases[lease_id]
        assert lease_id not in pool.fixed and pieces in pool.ways(lease)
        for piece in pieces:
            both[piece.gpu_uuid] = both.get(piece.gpu_uuid, 0) + piece.memory_mib
    assert all(both.get(gpu.uuid, 0) <= MIB for gpu in pool.free())
    for gpu in pool.free():
        assert 0 <= kept.blocked_mib.get(gpu.uuid, 0) <= MIB - pool.used.get(gpu.uuid, 0), "it is free now"
    used = pool.after(kept.moves)
    for lease_id in kept.waits_for:
        for piece in pool.leases[lease_id].slices:
            used[piece.gpu_uuid] -= piece.memory_mib
    assert all(used.get(piece.gpu_uuid, 0) + piece.memory_mib <= MIB for piece in kept.slices)


@given(pools(), REQUESTS)
def test_one_move_is_found_where_one_is_enough_and_a_plan_has_no_move_too_many(
    pool: Pool, request: Request
) -> None:
    kept = pool.reserve(request)
    if kept is None or placement.place(request, pool.servers, pool.used) is not None:
        return
    assert kept == PlacementIndex(pool.servers).reserve(request, pool.used, pool.on, Movable(pool.movable))
    if kept.waits_for:
        return
    for fewer in chain.from_iterable(combinations(kept.moves, n) for n in range(len(kept.moves))):
        used = pool.after({lease_id: kept.moves[lease_id] for lease_id in fewer})
        assert any(used.get(piece.gpu_uuid, 0) + piece.memory_mib > MIB for piece in kept.slices)


@given(pools(), st.sampled_from((30, 60, 100)))
def test_a_request_for_one_gpu_waits_only_if_no_single_move_makes_room(pool: Pool, share: int) -> None:
    request = Request("head", "ben", memory_mib=share)
    kept = pool.reserve(request)
    if kept is None or placement.place(request, pool.servers, pool.used) is not None:
        return
    smallest = {
        gpu.uuid: min(
            (
                held.memory_mib
                for held in pool.on(gpu.uuid).values()
                if held.memory_mib >= share - (MIB - pool.used.get(gpu.uuid, 0))
            ),
            default=0,
        )
        for gpu in pool.free()
    }
    for lease, gpu in product(pool.leases.values(), pool.free()):
        is_first_choice = any(
            piece.gpu_uuid == gpu.uuid and piece.memory_mib == smallest[gpu.uuid] for piece in lease.slices
        )
        is_only = sum(held.memory_mib == smallest[gpu.uuid] for held in pool.on(gpu.uuid).values()) == 1
        if lease.id in pool.fixed or not is_first_choice or not is_only or len(lease.slices) > 1:
            continue
        if not any(one.draining for one in pool.servers if gpu in one.gpus) and any(
            pool.used.get(piece.gpu_uuid, 0) + piece.memory_mib <= MIB
            for (piece,) in pool.ways(lease)
            if piece.gpu_uuid != gpu.uuid
        ):
            assert not kept.waits_for and len(kept.moves) == 1


def test_the_smallest_lease_that_is_enough_moves_to_the_gap_that_fits_it() -> None:
    pool = Pool([server("a", 1), server("b", 2)])
    (a,), (b, c) = pool.servers[0].gpus, pool.servers[1].gpus
    pool.add([a], 70)
    small = pool.add([a], 20)
    pool.add([b], 75)
    pool.add([c], 85)
    kept = pool.reserve(Request("head", "ben", memory_mib=30))
    assert kept is not None and not kept.waits_for
    assert {lease_id: pieces[0].gpu_uuid for lease_id, pieces in kept.moves.items()} == {small.id: b.uuid}
    assert kept.blocked_mib == {a.uuid: 10, b.uuid: 20}


def test_a_lease_may_have_to_leave_its_server() -> None:
    pool = Pool([server("a", 2), server("b", 1)])
    (a, a2), (b,) = (one.gpus for one in pool.servers)
    pool.add([a], 50)
    pool.add([a2], 50)
    pool.add([b], 40)
    request = Request("head", "ben", memory_mib=100, filters={"server": "a"})
    for within_server, to in ((True, a2), (False, b)):
        kept = reserve(request, pool.servers, pool.used, pool.on, Movable(pool.movable, within_server))
        assert kept is not None
        assert [pieces[0].gpu_uuid for pieces in kept.moves.values()] == [to.uuid]


def test_a_head_waits_where_leases_leave_and_not_where_they_arrive() -> None:
    pool = Pool([server("a", 1), server("b", 1), server("c", 1)])
    (a,), (b,), (c,) = (one.gpus for one in pool.servers)
    lease = pool.add([a], 60)
    pool.leases[lease.id] = moving = replace(lease, moving_to=placement.slices(lease.request, [b]))
    pool.used.use(b.uuid, 60)
    pool.add([c], 70)
    assert moving.moving_to
    kept = pool.reserve(Request("head", "ben", memory_mib=100))
    assert kept is not None
    assert ([piece.gpu_uuid for piece in kept.slices], kept.waits_for, dict(kept.moves)) == (
        [a.uuid],
        {lease.id},
        {},
    )


def test_gpus_whose_leases_miss_the_least_room_are_kept_and_that_room_too() -> None:
    pool = Pool([server("a", 2), server("b", 2), server("c", 1)])
    (a, a2), (b, b2), (c,) = (one.gpus for one in pool.servers)
    for gpu in (a, a2, b):
        pool.add([gpu], 100)
    last = pool.add([b2], 50)
    pool.add([c], 40)
    kept = pool.reserve(Request("head", "ben", 2, memory_mib=100))
    assert kept is not None
    assert {piece.gpu_uuid for piece in kept.slices} == {b.uuid, b2.uuid}
    assert list(kept.moves) == [last.id] and kept.waits_for == {"02"}
    assert kept.blocked_mib == {b.uuid: 0, b2.uuid: 50, c.uuid: 50}


def test_room_is_awaited_where_more_leases_may_end() -> None:
    pool = Pool([server("rare", 2, "G3"), *(server(f"s{n}", 2) for n in range(4))])
    rare, *common = (gpu for one in pool.servers for gpu in one.gpus)
    pool.add([rare], 100)
    for gpu in common[2:]:
        pool.add([gpu], 100)
    kept = pool.reserve(Request("head", "ben", 2, memory_mib=100))
    assert kept is not None and len(kept.waits_for) == 1
    assert {piece.server for piece in kept.slices} != {"rare"}, "one of seven ends before the only one"


def test_a_lease_on_unlike_slices_or_several_servers_has_no_shape_to_move() -> None:
    pool = Pool([server("a", 2), server("b", 1)])
    (a, a2), (b,) = (one.gpus for one in pool.servers)
    assert has_one_shape(pool.add([a, a2], 30))
    assert not has_one_shape(pool.add([a, b], 30))
    lease = pool.add([a, a2], 30)
    assert not has_one_shape(
        replace(lease, slices=(lease.slices[0], replace(lease.slices[1], memory_mib=20)))
    )


@given(pools())
def test_the_bound_is_never_above_what_is_left(pool: Pool) -> None:
    room = FreeRoom(pool.servers, pool.used)
    for one in pool.servers:
        here = [
            lease
            for lease in pool.leases.values()
            if has_one_shape(lease) and lease.slices[0].server == one.name
        ]
        assert room.min_missing(here, one.gpus) <= room.relocate(here, one.gpus).missing + 1e-6
