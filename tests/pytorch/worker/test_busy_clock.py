"""How busy a device was, where calls return before their work is done."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.worker.busy_clock import BusyClock


@dataclass
class Gpu:
    """Runs batches one after the other; each takes the seconds that are given. Its own clock has another start."""

    now_s: float = 100.0
    free_at_s: float = 100.0
    clock: BusyClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = BusyClock(self.record, lambda: self.now_s)

    @dataclass
    class Event:
        gpu: Gpu
        at_s: float

        def query(self) -> bool:
            return self.gpu.now_s >= self.at_s

        def synchronize(self) -> None:
            raise AssertionError("the clock must not wait")

        def elapsed_time(self, end: Gpu.Event) -> float:
            assert self.query() and end.query(), "CUDA refuses this"
            return (end.at_s - self.at_s) * 1e3

    def record(self) -> Event:
        return self.Event(self, self.free_at_s)

    def run(self, seconds: float) -> None:
        """Submit work of so many seconds, which takes no time on the host."""
        self.free_at_s = max(self.free_at_s, self.now_s) + seconds
        self.clock.submitted(self.now_s)


def test_a_long_kernel_is_busy_while_it_runs() -> None:
    gpu = Gpu()
    assert gpu.clock.seconds() == 0
    gpu.run(60)
    for second in range(1, 61):
        gpu.now_s = 100.0 + second
        assert gpu.clock.seconds() == pytest.approx(second)
    gpu.now_s = 200.0
    assert gpu.clock.seconds() == pytest.approx(60)


def test_work_that_is_first_looked_at_long_after_its_end_counts_as_long_as_it_took() -> None:
    gpu = Gpu()
    gpu.now_s = 110.0
    gpu.run(2)
    gpu.now_s = 200.0
    assert gpu.clock.seconds() == pytest.approx(2)


def test_batches_add_up_and_pauses_do_not_count() -> None:
    gpu = Gpu()
    for _ in range(10):
        gpu.run(0.5)  # waits for those before
        gpu.run(0.25)
        gpu.now_s += 3.0
    assert gpu.clock.seconds() == pytest.approx(7.5)


def test_seconds_never_fall_and_never_exceed_what_has_passed() -> None:
    gpu = Gpu()
    last = 0.0
    for step in range(200):
        if step % 3 == 0:
            gpu.run(0.05 * (step % 7))
        gpu.now_s += 0.04
        seconds = gpu.clock.seconds()
        assert last <= seconds <= gpu.now_s - 100.0 + 1e-9
        last = seconds


def test_what_is_never_looked_at_takes_no_memory() -> None:
    gpu = Gpu()
    for _ in range(5000):
        gpu.run(1.0)
    assert len(gpu.clock._unfinished) <= 1000
    gpu.now_s += 5000.0
    assert gpu.clock.seconds() == pytest.approx(5000.0)
