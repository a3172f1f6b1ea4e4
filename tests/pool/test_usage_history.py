"""What the chart is drawn from: fine and coarse samples, bounds, and gaps that stay gaps."""

from __future__ import annotations

import pytest

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.ledger.tables import samples
from jupyter_gpupool.pool.usage_history import MOST_POINTS, TIERS, History, Use, fitting

START = 1_800_000_000  # a multiple of every step


def half(granted: float = 500, busy: float = 0.5) -> dict[str, Use]:
    return {"GPU-a": Use(1000, granted, granted / 2, busy), "GPU-b": Use(3000, 0, 0, 0.0)}


def rows(ledger: Ledger) -> list[tuple[int, int]]:
    with ledger.reading() as tx:
        return sorted((row.step_s, row.at) for row in tx.execute(samples.select()))


def test_a_pool_and_each_of_its_gpus(ledger: Ledger) -> None:
    history = History(ledger)
    history.record(START, half(500))
    history.record(START + 5, half(700))
    said = history.series(START + 6, START, 5, None)
    assert said["times"] == [START, START + 5]
    assert said["memory_mib"] == [4000, 4000]
    assert said["granted_mib"] == [500, 700]
    assert said["used_mib"] == [250, 350]
    assert said["busy"] == [0.25, 0.25]  # of two GPUs one computes half of the time
    assert said["gpus"]["GPU-a"]["granted_mib"] == [500, 700]
    assert said["gpus"]["GPU-b"]["busy"] == [0, 0]


def test_gpus_are_told_only_when_asked_for(ledger: Ledger) -> None:
    history = History(ledger)
    history.record(START, half())
    assert history.series(START, START)["gpus"] == {}
    assert list(history.series(START, START, gpus=["GPU-b", "GPU-of-nobody"])["gpus"]) == ["GPU-b"]


def test_a_slot_that_nobody_measured_is_a_gap(ledger: Ledger) -> None:
    history = History(ledger)
    history.record(START, half())
    history.record(START + 15, half())
    assert history.series(START + 15, START, 5)["granted_mib"] == [500, None, None, 500]


def test_a_gpu_that_came_later_has_a_gap_before(ledger: Ledger) -> None:
    history = History(ledger)
    history.record(START, {"GPU-a": Use(1000, 0, 0, 0.0)})
    history.record(START + 5, half())
    assert history.series(START + 5, START, 5, None)["gpus"]["GPU-b"]["memory_mib"] == [None, 3000]


def test_coarse_samples_are_means_of_fine_ones_and_the_present_is_told_as_well(ledger: Ledger) -> None:
    history = History(ledger)
    for at in range(START, START + 66, 5):
        history.record(at, half(100 if at < START + 60 else 900))
    day = history.series(START + 66, START - 7200)
    assert day["step"] == 60
    assert day["granted_mib"][-2:] == [100, 900]
    assert set(day["granted_mib"][:-2]) == {None}
    assert (60, START) in rows(ledger) and (60, START + 60) not in rows(ledger)


def test_a_week_is_remembered_in_tens_of_minutes_across_a_restart(ledger: Ledger) -> None:
    for minute in range(25):
        history = History(ledger)  # as if the pool were restarted every minute
        for second in range(0, 60, 5):
            history.record(START + minute * 60 + second, half(minute * 10))
    now = START + 25 * 60
    week = History(ledger).series(now, now - 3 * 86400)
    assert week["step"] == 600
    assert [v for v in week["granted_mib"] if v is not None] == [45, 145, 220]


def test_it_stays_bounded(ledger: Ledger) -> None:
    history = History(ledger)
    for at in range(START, START + 8000, 5):
        history.record(at, half())
    fine = [at for step, at in rows(ledger) if step == 5]
    assert len(fine) <= 3600 // 5 + 1
    # After a long pause everything that is too old goes with the first sample.
    history.record(START + 30 * 86400, half())
    assert all(at >= START + 30 * 86400 - 7 * 86400 for _, at in rows(ledger))


def test_a_clock_that_was_set_back_does_not_stop_it(ledger: Ledger) -> None:
    history = History(ledger)
    history.record(START + 86400, half())
    assert not history.due(START + 86400 + 1)
    assert history.due(START)
    history.record(START, half())
    assert rows(ledger) == [(5, START)]


@pytest.mark.parametrize(
    ("span_s", "wanted", "tier", "step"),
    [
        (300, None, 5, 5),
        (3600, 7, 5, 10),
        (86400, None, 60, 60),
        (86400, 5, 60, 60),
        (7 * 86400, 900, 600, 1200),
    ],
)
def test_the_step_suits_the_samples_there_are(
    span_s: float, wanted: int | None, tier: int, step: int
) -> None:
    base, answered = fitting(span_s, wanted)
    assert (TIERS[base][0], answered) == (tier, step)
    assert span_s / answered <= MOST_POINTS


def test_a_step_below_one_second_is_refused(ledger: Ledger) -> None:
    with pytest.raises(InvalidRequest, match="step=0"):
        History(ledger).series(START, START, 0)
