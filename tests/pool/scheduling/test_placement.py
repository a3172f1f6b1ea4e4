from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jupyter_gpupool.core.models import GPU, Request, Server
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.scheduling.placement import impossible, place, share_mib

ONE = [Server("one", "127.0.0.1", emulated_gpus("one"))]
A, B = ONE[0].gpus


def request(**values: Any) -> Request:
    if "memory_mib" not in values:
        values.setdefault("partial", 1.0)
    return Request(id="1", owner="ada", **values)


def gpu(server: str, index: int, memory: int = 1000, **values: Any) -> GPU:
    values.setdefault("name", "Card")
    return GPU(uuid=f"{server}-{index}", server=server, index=index, memory_mib=memory, **values)


def test_eighty_percent_of_two_v100s() -> None:
    slices = place(request(num_gpus=2, partial=0.8), ONE, {})
    assert slices is not None
    assert [(piece.index, piece.memory_mib, piece.total_mib) for piece in slices] == [
        (0, 26008, 32510),
        (1, 26008, 32510),
    ]
    assert all(piece.emulated and "emulated" in piece.name for piece in slices)


@pytest.mark.parametrize(
    ("partial", "memory", "expected"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.7, 10, 7),
        (1, 32510, 32510),
        (1e-05, 200_000, 2),
        (0.8, 32510, 26008),
    ],
)
def test_fractions_are_the_decimals_that_were_written(partial: float, memory: int, expected: int) -> None:
    assert share_mib(request(partial=partial), gpu("s", 0, memory)) == expected


def test_two_halves_share_one_gpu_and_a_third_does_not_fit_on_it() -> None:
    first = place(request(partial=0.5), ONE, {})
    assert first is not None and first[0].gpu_uuid == A.uuid
    second = place(request(partial=0.5), ONE, {A.uuid: 16255})
    assert second is not None and second[0].gpu_uuid == A.uuid, "best fit fills a GPU before it opens another"
    assert place(request(partial=0.3, filters={"index": "0"}), ONE, {A.uuid: 32510}) is None


def test_the_gpus_that_are_left_with_least_are_taken() -> None:
    servers = [Server("s", "h", (gpu("s", 0), gpu("s", 1), gpu("s", 2)))]
    slices = place(request(num_gpus=2, memory_mib=200), servers, {"s-1": 700, "s-2": 100})
    assert slices is not None and [piece.index for piece in slices] == [1, 2]


def test_the_server_that_fits_best_is_taken_and_a_lease_never_spans_servers() -> None:
    servers = [
        Server("a", "h", (gpu("a", 0), gpu("a", 1))),
        Server("b", "h", (gpu("b", 0), gpu("b", 1))),
    ]
    slices = place(request(num_gpus=2, memory_mib=100), servers, {"b-0": 500})
    assert slices is not None and {piece.server for piece in slices} == {"b"}
    assert place(request(num_gpus=2, memory_mib=600), servers, {"a-0": 500, "b-0": 500}) is None


def test_one_that_spreads_is_on_as_few_servers_as_possible() -> None:
    servers = [
        Server("c", "h", (gpu("c", 0), gpu("c", 1), gpu("c", 2))),
        Server("b", "h", (gpu("b", 0), gpu("b", 1))),
        Server("a", "h", (gpu("a", 0), gpu("a", 1))),
    ]

    def placed(count: int, used: dict[str, int]) -> list[str]:
        found = place(request(num_gpus=count, spread=True, memory_mib=600), servers, used)
        return [piece.gpu_uuid for piece in found or ()]

    assert placed(2, {"a-0": 300, "a-1": 300}) == ["a-0", "a-1"], "one that has room for all, the best"
    assert placed(4, {"a-1": 200}) == ["a-1", "c-0", "c-1", "c-2"], (
        "for the rest the best fit; in order of names"
    )
    assert placed(5, {"c-0": 500}) == ["a-0", "b-0", "b-1", "c-1", "c-2"]
    assert placed(7, {}) == ["a-0", "a-1", "b-0", "b-1", "c-0", "c-1", "c-2"]
    assert placed(7, {"b-0": 500}) == [] == placed(8, {})


def test_unhealthy_gpus_are_left_alone() -> None:
    servers = [Server("s", "h", (gpu("s", 0, healthy=False), gpu("s", 1)))]
    slices = place(request(), servers, {})
    assert slices is not None and slices[0].index == 1
    assert "1 of them unhealthy" in str(impossible(request(num_gpus=2), servers))


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({"name": "a100"}, 1),
        ({"server": "s"}, 0),
        ({"uuid": "S-1"}, 1),
        ({"index": "1"}, 1),
        ({"emulated": "true"}, 2),
        ({"name": "card", "emulated": "False"}, 0),
    ],
)
def test_filters(filters: dict[str, str], index: int) -> None:
    cards = (gpu("s", 0), gpu("s", 1, name="NVIDIA A100-SXM4"), gpu("s", 2, emulated=True))
    slices = place(request(filters=filters), [Server("s", "h", cards)], {})
    assert slices is not None and slices[0].index == index


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_gpus": 9}, "9 GPUs asked for, but the pool has 2"),
        ({"memory_mib": 32511}, "32511 MiB per GPU asked for, but the largest that fits has 32510 MiB"),
        ({"partial": 1e-5}, "1e-05 of a GPU with 32510 MiB is less than 1 MiB"),
        (
            {"filters": {"name": "A100"}},
            "1 GPU with name=A100 asked for, but 0 of the pool's match; "
            "it has Tesla V100-PCIE-32GB (emulated) on one",
        ),
    ],
)
def test_what_can_never_be_is_explained(values: dict[str, Any], reason: str) -> None:
    assert impossible(request(**values), ONE) == reason


def test_more_than_any_one_server_has_is_impossible() -> None:
    servers = [Server("a", "h", (gpu("a", 0),)), Server("b", "h", (gpu("b", 0),))]
    reason = "2 GPUs on one server asked for, but no server has more than 1 that fit"
    reason += "; ask with --spread (spread=True) to have them on several servers"
    assert impossible(request(num_gpus=2), servers) == reason
    assert impossible(request(), []) == "the pool has no GPUs"
    assert impossible(request(num_gpus=2, spread=True), servers) is None
    mixed = [Server("a", "h", (gpu("a", 0), gpu("a", 1, 500)))]
    assert "only 1 of the pool's" in str(impossible(request(num_gpus=2, memory_mib=600), mixed))


pools = st.lists(
    st.lists(st.tuples(st.integers(1, 200_000), st.booleans()), min_size=0, max_size=4),
    min_size=0,
    max_size=4,
).map(
    lambda shape: [
        Server(str(s), "h", tuple(gpu(str(s), i, size, healthy=fit) for i, (size, fit) in enumerate(sizes)))
        for s, sizes in enumerate(shape)
    ]
)
sizes = st.one_of(
    st.floats(0, 1, exclude_min=True).map(lambda p: {"partial": p}),
    st.integers(1, 200_000).map(lambda m: {"memory_mib": m}),
)


@given(pools, st.integers(1, 5), sizes, st.booleans(), st.data())
def test_a_placement_keeps_every_promise(
    servers: list[Server], count: int, size: dict[str, Any], spread: bool, data: st.DataObject
) -> None:
    every = {g.uuid: g for s in servers for g in s.gpus}
    used = {uuid: data.draw(st.integers(0, g.memory_mib)) for uuid, g in every.items()}
    asked = request(num_gpus=count, spread=spread, **size)
    slices = place(asked, servers, used)
    fits = sorted(
        (
            sum(g.healthy and 1 <= share_mib(asked, g) <= g.memory_mib - used[g.uuid] for g in s.gpus)
            for s in servers
        ),
        reverse=True,
    )
    if slices is None:
        most = sum(fits) if spread else max(fits, default=0)
        assert most < count, "it refuses only what does not fit"
        return
    assert impossible(asked, servers) is None, "what is granted is never called impossible"
    assert len({piece.gpu_uuid for piece in slices}) == len(slices) == count
    fewest = next(n for n in range(1, 5) if sum(fits[:n]) >= count)
    assert len({piece.server for piece in slices}) == (fewest if spread else 1)
    if fewest == 1:
        assert slices == place(request(num_gpus=count, **size), servers, used), (
            "it spreads only where it has to"
        )
    assert [(p.server, p.index) for p in slices] == sorted((p.server, p.index) for p in slices)
    for piece in slices:
        card = every[piece.gpu_uuid]
        assert card.healthy
        assert 1 <= piece.memory_mib <= card.memory_mib - used[card.uuid]
        assert piece.memory_mib == share_mib(asked, card)


@given(pools, st.integers(1, 5), sizes, st.booleans())
def test_an_idle_pool_grants_exactly_what_is_not_impossible(
    servers: list[Server], count: int, size: dict[str, Any], spread: bool
) -> None:
    asked = request(num_gpus=count, spread=spread, **size)
    assert (place(asked, servers, {}) is None) == (impossible(asked, servers) is not None)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**6))
def test_a_share_is_the_exact_floor(partial: float, memory: int) -> None:
    assume(partial > 1e-300)
    exact = math.floor(Decimal(repr(partial)) * memory)
    assert share_mib(request(partial=partial), gpu("s", 0, memory)) == exact <= memory
