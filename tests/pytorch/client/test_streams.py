"""Streams and events order work, wait and measure time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(params=["cuda", "gpupool"])
def module(request: pytest.FixtureRequest, attached: object) -> object:
    return getattr(torch, request.param)


def work(times: int = 20) -> torch.Tensor:
    x = torch.eye(300, device="cuda")
    for _ in range(times):
        x = x @ x
    return x


def test_an_event_measures_the_work_between(module: object, eventually: Callable) -> None:
    def more_takes_longer() -> bool:
        torch.cuda.synchronize()
        started = time.perf_counter()
        marks = [module.Event(enable_timing=True) for _ in range(3)]  # type: ignore[attr-defined]
        marks[0].record()
        work(20)
        marks[1].record()
        work(400)
        marks[2].record()
        marks[2].synchronize()
        passed = (time.perf_counter() - started) * 1e3
        few, many = marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
        assert 0 < few < passed and 0 < many < passed
        assert few + many == pytest.approx(marks[0].elapsed_time(marks[2]))
        return few < many  # unless a busy machine held up the first part

    eventually(more_takes_longer, "twenty times the work takes longer")


def test_queries_tell_the_truth(module: object) -> None:
    event, stream = module.Event(), module.Stream()  # type: ignore[attr-defined]
    assert event.query(), "CUDA too says so of an event that nobody has recorded"
    event.record(stream)
    event.synchronize()
    assert event.query()
    assert stream.query()
    stream.synchronize()
    module.synchronize()  # type: ignore[attr-defined]


def test_what_a_stream_waits_for_is_done_before(module: object) -> None:
    side = module.Stream()  # type: ignore[attr-defined]
    x = work()
    side.wait_stream(module.current_stream())  # type: ignore[attr-defined]
    with module.stream(side):  # type: ignore[attr-defined]
        y = x + 1
        x.record_stream(side)
        done = side.record_event()
    done.wait()
    module.current_stream().wait_event(done)  # type: ignore[attr-defined]
    module.current_stream().wait_stream(side)  # type: ignore[attr-defined]
    assert (y - x).sum().item() == 90000


def test_the_current_stream_is_each_threads_own(module: object) -> None:
    default = module.default_stream()  # type: ignore[attr-defined]
    assert module.current_stream() == default  # type: ignore[attr-defined]
    side = module.Stream()  # type: ignore[attr-defined]
    seen = []
    with module.stream(side):  # type: ignore[attr-defined]
        assert module.current_stream() == side != default  # type: ignore[attr-defined]
        assert hash(module.current_stream()) == hash(side)  # type: ignore[attr-defined]
        thread = threading.Thread(target=lambda: seen.append(module.current_stream()))  # type: ignore[attr-defined]
        thread.start()
        thread.join()
        with module.stream(None):  # type: ignore[attr-defined]
            assert module.current_stream() == side  # type: ignore[attr-defined]
    assert seen == [default]
    assert module.current_stream() == default  # type: ignore[attr-defined]
    module.set_stream(side)  # type: ignore[attr-defined]
    assert module.current_stream() == side  # type: ignore[attr-defined]
    module.set_stream(default)  # type: ignore[attr-defined]


def test_a_stream_of_another_slice_brings_its_device_along(attached: object) -> None:
    side = torch.cuda.Stream("cuda:1")
    assert str(side.device) == "cuda:1"
    with torch.cuda.stream(side):
        assert torch.cuda.current_device() == 1
        assert str(torch.ones(1, device="cuda").device) == "cuda:1"
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="does not match recording stream"):
        event = torch.cuda.Event()
        event.record(side)
        event.record(torch.cuda.current_stream())


def test_times_that_cannot_be_told_are_refused(attached: object) -> None:
    silent, timed = torch.cuda.Event(), torch.cuda.Event(enable_timing=True)
    with pytest.raises(ValueError, match="enable_timing=True"):
        silent.elapsed_time(timed)
    with pytest.raises(ValueError, match="must be recorded"):
        timed.elapsed_time(torch.cuda.Event(enable_timing=True))
    with pytest.raises(RuntimeError, match="cannot be shared between processes"):
        torch.cuda.Event(interprocess=True)


def test_pytorchs_own_names_for_any_accelerator(attached: object) -> None:
    stream = torch.Stream("cuda:1")
    event = torch.Event("cuda", enable_timing=True)
    assert isinstance(stream, torch.Stream)
    assert isinstance(event, torch.Event)
    with stream:
        assert torch.accelerator.current_stream() == stream
        event.record()
        work()
    stream.synchronize()
    end = torch.Event("cuda", enable_timing=True)
    with torch.accelerator.device_index(1):
        assert torch.cuda.current_device() == 1
        end.record()
    assert torch.cuda.current_device() == 0
    assert event.elapsed_time(end) > 0
    torch.accelerator.synchronize()


def test_an_error_is_raised_where_a_program_waits(attached: object) -> None:
    bad = torch.nn.functional.embedding(torch.tensor([9], device="cuda"), torch.ones(3, 2, device="cuda"))
    with pytest.raises(IndexError, match="out of range"):
        torch.cuda.current_stream().synchronize()
    del bad
    torch.cuda.synchronize()


def test_dropped_events_are_freed_in_the_worker(attached: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(1000):
        torch.cuda.Event().record()
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        first.record()
        last.record()
        assert first.elapsed_time(last) >= 0
