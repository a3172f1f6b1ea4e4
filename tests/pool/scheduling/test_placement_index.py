"""The index gives the answers of placement, by every policy, whatever happened before."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.core.models import Request, Server
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.scheduling import placement
from jupyter_gpupool.pool.scheduling.placement_index import Granted, PlacementIndex, trial_grants
from jupyter_gpupool.pool.scheduling.policy import FEW_SERVERS, POLICIES, SPREAD, PlacementPolicy

EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))


@EVERY_POLICY
def test_it_answers_as_placement_does(ask: Callable[..., Request], policy: PlacementPolicy) -> None:
    chance = random.Random(5)
    sizes = [1000, 1000, 700, 2000]
    servers = [
        Server(f"s{n}", "127.0.0.1", emulated_gpus(f"s{n}", count=1 + n % 4, memory_mib=sizes[n % 4]))
        for n in range(12)
    ]
    servers[3] = Server(servers[3].name, servers[3].host, servers[3].gpus, draining=True)
    used, index = Granted({}), PlacementIndex(servers, policy)
    held: list[tuple] = []
    granted = refused = spread = 0
    for _ in range(4000):
        if held and chance.random() < 0.45:
            for piece in held.pop(chance.randrange(len(held))):
                used.use(piece.gpu_uuid, -piece.memory_mib)
            continue
        request = ask(
            num_gpus=chance.choice([1, 1, 2, 3, 5]),
            spread=chance.random() < 0.3,
            filters=chance.choice([{}, {}, {"server": f"s{chance.randrange(12)}"}, {"index": "0"}]),
            **chance.choice([{"partial": p} for p in (0.1, 0.29, 0.5, 1.0)] + [{"memory_mib": 650}]),
        )
        expected = placement.place(request, servers, dict(used), policy)
        assert index.place(request, used) == expected
        assert index.impossible(request) == placement.impossible(request, servers)
        if expected is None:
            refused += 1
            continue
        granted += 1
        spread += len({piece.server for piece in expected}) > 1
        for piece in expected:
            used.use(piece.gpu_uuid, piece.memory_mib)
        held.append(expected)
    assert granted > 500 and refused > 100 and spread > 50, "all of it happened"


SHARES = st.one_of(
    st.sampled_from([0.1, 0.29, 0.5, 1.0]).map(lambda p: {"partial": p}),
    st.sampled_from([1, 350, 650]).map(lambda m: {"memory_mib": m}),
)
REQUESTS = st.builds(
    lambda share, **others: Request("", "ada", secret_sha256="0" * 64, **share, **others),
    SHARES,
    num_gpus=st.integers(1, 5),
    spread=st.booleans(),
    filters=st.sampled_from([{}, {}, {"server": "s0"}, {"index": "1"}]),
)
POOLS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([500, 700, 1000])), min_size=1, max_size=5).map(
    lambda sizes: [
        Server(f"s{n}", "127.0.0.1", emulated_gpus(f"s{n}", count=count, memory_mib=mib))
        for n, (count, mib) in enumerate(sizes)
    ]
)
#: A request, or the number of a grant that is released.
STEPS = st.lists(st.one_of(REQUESTS, REQUESTS, st.integers(0, 20)), max_size=25)


@EVERY_POLICY
@given(servers=POOLS, steps=STEPS)
def test_index_and_reference_agree(policy: PlacementPolicy, servers: list[Server], steps: list[Any]) -> None:
    used, index = Granted({}), PlacementIndex(servers, policy)
    held: list[Any] = []
    memory = {gpu.uuid: gpu.memory_mib for server in servers for gpu in server.gpus}
    for step in steps:
        if isinstance(step, int):
            for piece in held.pop(step % len(held)) if held else ():
                used.use(piece.gpu_uuid, -piece.memory_mib)
            continue
        found = index.place(step, used)
        assert found == placement.place(step, servers, dict(used), policy)
        if found is None:
            continue
        assert len({piece.gpu_uuid for piece in found}) == step.num_gpus
        assert step.spread or len({piece.server for piece in found}) == 1
        for piece in found:
            used.use(piece.gpu_uuid, piece.memory_mib)
        assert all(mib <= memory[uuid] for uuid, mib in used.items())
        held.append(found)


@EVERY_POLICY
@given(servers=POOLS, request=REQUESTS)
def test_every_policy_places_what_is_possible_in_an_idle_pool(
    policy: PlacementPolicy, servers: list[Server], request: Request
) -> None:
    possible = placement.impossible(request, servers) is None
    assert (placement.place(request, servers, {}, policy) is not None) == possible


def test_few_servers_fills_gpus_and_spread_leaves_them_idle(ask: Callable[..., Request]) -> None:
    servers = [Server("one", "127.0.0.1", emulated_gpus("one", count=2, memory_mib=1000))]
    servers += [Server("two", "127.0.0.1", emulated_gpus("two", count=2, memory_mib=1000))]
    used = {servers[0].gpus[0].uuid: 300}

    def chosen(policy: PlacementPolicy, **wanted: Any) -> list[tuple[str, int]]:
        found = placement.place(ask(memory_mib=500, **wanted), servers, used, policy)
        return [(piece.server, piece.index) for piece in found or ()]

    assert chosen(FEW_SERVERS, num_gpus=1) == [("one", 0)], "the GPU that is in use already"
    assert chosen(SPREAD, num_gpus=1) == [("two", 0)], "an idle GPU of an idle server"
    assert chosen(FEW_SERVERS, num_gpus=2, spread=True) == [("one", 0), ("one", 1)]
    assert chosen(SPREAD, num_gpus=2, spread=True) == [("one", 1), ("two", 0)]


def test_trial_grants_are_undone() -> None:
    used = Granted({"a": 100})
    with trial_grants(used) as room:
        room.use_on_trial("a", 50)
        room.use_on_trial("b", 10)
        assert dict(room) == {"a": 150, "b": 10}
    assert {uuid: mib for uuid, mib in used.items() if mib} == {"a": 100}
