"""Slices in Ray's terms, and what others hold of a node's GPUs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.engines.ray.fractions import UNIT, assign, foreign, units


def test_slices_that_fit_a_gpu_fit_it_in_ray() -> None:
    assert units(26008, 32510) == 8000
    assert 3 * units(10836, 32510) <= UNIT
    assert units(1, 200_000) == 1, "Ray has nothing smaller"


@given(st.integers(1, 200_000).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_a_slice_is_never_more_in_ray_than_in_the_ledger(sizes: tuple[int, int]) -> None:
    total, memory = sizes
    assert units(memory, total) == 1 or units(memory, total) * total <= memory * UNIT


def test_what_others_hold_is_what_is_neither_free_nor_ours() -> None:
    node = {
        "GPU": 0.7,
        "GPU_group_aa": 0.4,
        "GPU_group_0_aa": 0.4,
        "GPU_group_bb": 0.2,
        "GPU_group_0_bb": 0.2,
    }
    assert foreign(2, node, ["aa"]) == 9000
    assert foreign(2, node, ["aa", "bb"]) == 7000
    assert foreign(2, {}, []) == 20_000, "a node without any free GPU does not list them"
    assert foreign(2, {"GPU": 1.5999, "GPU_group_aa": 0.4}, ["aa"]) == 0, "a question of ours, on its way"


def test_others_are_where_ray_would_have_put_them() -> None:
    assert assign(0, [0, 0]) == [0, 0]
    assert assign(10_000, [0, 0]) == [10_000, 0]
    assert assign(10_000, [3000, 0]) == [0, 10_000], "a whole one needs a whole one"
    assert assign(2000, [0, 5000]) == [0, 2000], "best fit"
    assert assign(12_000, [3000, 0]) == [2000, 10_000]
    assert assign(8000, [5000, 5000]) == [5000, 3000], "in several pieces, then"
    assert assign(30_000, [0, 0]) == [10_000, 10_000]
