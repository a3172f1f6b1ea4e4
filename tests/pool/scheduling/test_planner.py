"""The planner against exhaustive search: what it parks makes room, is allowed, is the cheapest, and nothing is idle."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.core.models import GPU, Slice
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.scheduling.planner import IdleLease, Plan, plan

GPUS = {name: emulated_gpus(name, count=3, memory_mib=100) for name in ("one", "two")}
SHARES = (30, 50, 100)


def piece(gpu: GPU, mib: int) -> Slice:
    return Slice(gpu.uuid, gpu.server, gpu.index, gpu.name, mib, gpu.memory_mib, gpu.emulated)


@st.composite
def pools(draw: st.DrawFn) -> tuple[dict[str, int], list[IdleLease]]:
    """What is granted of each GPU, and the leases that may be parked; the rest is of leases that may not."""
    used = {gpu.uuid: 0 for gpus in GPUS.values() for gpu in gpus}
    idle = []
    for number in range(draw(st.integers(0, 8))):
        gpus = draw(st.sampled_from(list(GPUS.values())))
        some = draw(st.lists(st.sampled_from(gpus), min_size=1, max_size=3, unique_by=lambda gpu: gpu.uuid))
        share = draw(st.sampled_from(SHARES))
        if any(used[gpu.uuid] + share > gpu.memory_mib for gpu in some):
            continue
        for gpu in some:
            used[gpu.uuid] += share
        slices = tuple(piece(gpu, share) for gpu in some)
        if draw(st.integers(0, 3)):
            mib = draw(st.integers(0, 100))
            idle.append(
                IdleLease(f"lease-{number}", slices, draw(st.integers(1, 9)), mib, draw(st.booleans()))
            )
    return used, idle


def has_room(used: dict[str, int], parked: tuple[IdleLease, ...], count: int, share: int) -> bool:
    left = dict(used)
    for lease in parked:
        for part in lease.slices:
            left[part.gpu_uuid] -= part.memory_mib
    return any(
        sum(gpu.memory_mib - left[gpu.uuid] >= share for gpu in gpus) >= count for gpus in GPUS.values()
    )


def planned(
    used: dict[str, int], idle: list[IdleLease], count: int, share: int, host: dict[str, int]
) -> Plan | None:
    return plan([[(gpu, share) for gpu in gpus] for gpus in GPUS.values()], count, used, idle, host)


@given(pools(), st.integers(1, 3), st.sampled_from(SHARES))
def test_the_plan_is_the_cheapest_that_makes_room(
    pool: tuple[dict[str, int], list[IdleLease]], count: int, share: int
) -> None:
    used, idle = pool
    found = planned(used, idle, count, share, {"one": 10_000, "two": 10_000})
    every = chain.from_iterable(combinations(idle, size) for size in range(len(idle) + 1))
    ways = [some for some in every if has_room(used, some, count, share)]
    if not ways or () in ways:
        assert found is None, "there is room, or there is no way to make some"
        return
    assert found is not None
    cheapest = min(tuple(map(sum, zip(*(lease.cost for lease in some), strict=True))) for some in ways)
    assert found.cost == pytest.approx(cheapest)


@given(pools(), st.integers(1, 3), st.sampled_from(SHARES), st.integers(0, 200))
def test_the_plan_makes_room_parks_no_more_than_it_needs_and_fits_into_host_memory(
    pool: tuple[dict[str, int], list[IdleLease]], count: int, share: int, host_mib: int
) -> None:
    used, idle = pool
    found = planned(used, idle, count, share, {"one": host_mib})
    if found is None:
        return
    by_id = {lease.id: lease for lease in idle}
    parked = tuple(by_id[lease_id] for lease_id in found.lease_ids)
    assert parked and len(set(parked)) == len(parked)
    assert has_room(used, parked, count, share)
    for lease in parked:
        assert not has_room(used, tuple(one for one in parked if one is not lease), count, share)
    there = {lease.slices[0].server for lease in parked if lease.used_mib}
    assert there <= {"one"}, "the other server has no host memory, which an empty lease does not need"
    assert sum(lease.used_mib for lease in parked) <= host_mib


def test_one_lease_is_parked_rather_than_two_a_clean_one_rather_than_another_then_the_longest_idle() -> None:
    (gpu, *_) = GPUS["one"]

    def parked(*leases: tuple[str, int, float, int, bool], share: int) -> tuple[str, ...]:
        idle = [IdleLease(id, (piece(gpu, mib),), *rest) for id, mib, *rest in leases]
        found = plan([[(gpu, share)]], 1, {gpu.uuid: 100}, idle, {"one": 1000})
        assert found is not None
        return found.lease_ids

    small, large = ("small", 20, 9.0, 1, True), ("large", 50, 5.0, 40, False)
    assert parked(small, ("little", 30, 9.0, 1, True), large, share=50) == ("large",)
    assert parked(("dirty", 50, 9.0, 40, False), ("clean", 50, 5.0, 50, True), share=50) == ("clean",)
    assert parked(("short", 50, 5.0, 40, True), ("long", 50, 9.0, 50, True), share=50) == ("long",)


def test_many_leases_are_planned_at_once() -> None:
    gpus = emulated_gpus("one", count=16, memory_mib=1000)
    idle = [IdleLease(f"{gpu.index}-{n}", (piece(gpu, 50),), 60.0, 10) for gpu in gpus for n in range(20)]
    used = {gpu.uuid: 1000 for gpu in gpus}
    found = plan([[(gpu, 400) for gpu in gpus]], 16, used, idle, {"one": 10_000})
    assert found is not None and len(found.lease_ids) == 16 * 8
