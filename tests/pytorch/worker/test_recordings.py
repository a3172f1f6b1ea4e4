"""The recordings of a device: their memory, how they end, and captures that fail, against a simulated driver."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker import cuda_graphs  # noqa: E402
from jupyter_gpupool.pytorch.worker.graph_replay import CALLS, MAX_RECORDINGS, PAID_REPLAYS  # noqa: E402

from ...support.graph_programs import POLYNOMIAL, RUNNING, Program  # noqa: E402
from ...support.simulated_cuda import MIB, SimulatedGpu  # noqa: E402
from ...support.simulated_graphs import WORKSPACE  # noqa: E402
from ...support.watched_lock import WatchedLock  # noqa: E402


def before_a_step(program: Program, id: int, act: Callable[[Any], object]) -> None:
    """Let a graph's third operator do something first, with one of its arguments."""
    step = program.steps(id)[2]
    real = step.op

    def op(*args: Any) -> Any:
        act(args[0])
        return real(*args)

    step.op = op


class TestFailures:
    @pytest.fixture
    def waiting(self, program: Program) -> Program:
        """A graph with an operator that waits for the device, which its definition does not tell."""
        program.define(POLYNOMIAL)
        before_a_step(program, 0, lambda a: a.sum().item())
        return program

    def test_the_operators_run_one_by_one(self, waiting: Program, gpu: SimulatedGpu) -> None:
        w = waiting.vector(2.0)
        results = {tuple(waiting.read(waiting.call(waiting.vector(1.0), w))) for _ in range(10)}
        assert len(results) == 1 and not waiting.is_recorded and not waiting.reports
        assert "stream is capturing" in waiting.graph.objection

    def test_the_allocator_and_the_stream_go_on(self, waiting: Program, gpu: SimulatedGpu) -> None:
        w = waiting.vector(2.0)
        for _ in range(10):
            waiting.call(waiting.vector(1.0), w)
        assert gpu.current is gpu.compute
        torch.cuda.empty_cache()
        waiting.define(RUNNING, id=1)
        for _ in range(8):
            waiting.call(w, waiting.vector(1.0), id=1)
        x = waiting.vector(1.0)
        for _ in range(8):
            waiting.call(x, w, id=1)
        assert waiting.session.graphs.states()[0][1] == "recorded"

    def test_graphs_that_are_recorded_stay_and_others_are_recorded_yet(self, program: Program) -> None:
        for id in range(4):
            program.define(POLYNOMIAL, id=id)
        before_a_step(program, 1, lambda a: a.sum().item())
        w = program.vector(2.0)
        results = [program.read(program.call(w, w, id=id)) for id in range(4) for _ in range(8)]
        assert program.session.graphs.states()[0] == ["recorded", "", "recorded", "recorded"]
        results += [program.read(program.call(w, w, id=id)) for id in range(4)]
        assert len(set(map(tuple, results))) == 1

    def test_another_slice_frees_its_cache_once_nothing_is_captured(
        self, program: Program, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other, lock = gpu.device(200), WatchedLock()
        monkeypatch.setattr(cuda_graphs, "_capturing", lock)
        failed: list[BaseException] = []

        def free() -> None:
            try:
                other.release_memory()
            except BaseException as e:
                failed.append(e)
            lock.asked.set()

        thread = threading.Thread(target=free)

        def meanwhile(a: Any) -> None:
            if gpu.pools.underway and not lock.asked.is_set():
                thread.start()
                assert lock.asked.wait(60)

        program.define(POLYNOMIAL)
        before_a_step(program, 0, meanwhile)
        w = program.vector(2.0)
        for _ in range(8):
            program.call(w, w)
        thread.join(60)
        assert program.is_recorded and lock.asked.is_set() and not failed

    def test_a_capture_that_finds_no_memory_is_tried_again(self, program: Program, gpu: SimulatedGpu) -> None:
        full = [True]

        def allocate(a: Any) -> None:
            if gpu.pools.underway and full[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        program.define(POLYNOMIAL)
        before_a_step(program, 0, allocate)
        w = program.vector(2.0)
        for _ in range(40):
            program.free(program.call(w, w))
        assert not program.is_recorded and not program.graph.objection
        assert program.device.recordings._failures == 0
        full[0] = False
        for _ in range(40):
            program.free(program.call(w, w))
        assert program.is_recorded and not program.reports

    def test_a_session_on_a_device_that_is_lost_gives_back_all_that_it_had(
        self, program: Program, gpu: SimulatedGpu
    ) -> None:
        w = program.vector(2.0)
        for id in range(2):
            program.define(POLYNOMIAL, id=id)
            for _ in range(8):
                program.call(w, w, id=id)
        assert program.session.graphs.states()[0] == ["recorded", "recorded"]
        gpu.sticky = RuntimeError("CUDA error: device-side assert triggered")
        with pytest.raises(RuntimeError, match="device-side assert"):
            program.session.close()
        assert program.device.allocated == WORKSPACE and not program.device._accounts
        assert gpu.pools.nbytes() == 0

    def test_a_device_that_is_lost_meanwhile_is_noticed(self, program: Program, gpu: SimulatedGpu) -> None:
        program.define(POLYNOMIAL)
        w = program.vector(2.0)
        for _ in range(CALLS):
            program.call(program.vector(1.0), w)
        x = program.vector(1.0)
        gpu.sticky = RuntimeError("CUDA error: device-side assert triggered")
        program.call(x, w)
        assert "cannot be used any more" in program.reports[0]["message"]

    def test_a_device_that_fails_again_and_again_records_no_more(self, program: Program) -> None:
        program.device.recordings._failures = 8
        program.define(POLYNOMIAL)
        assert "does not record" in program.graph.objection


class TestMemory:
    @pytest.fixture
    def recorded(self, program: Program) -> Program:
        program.define(POLYNOMIAL)
        self.w = program.vector(2.0)
        for _ in range(8):
            program.free(program.call(self.w, self.w))
        assert program.is_recorded
        return program

    def test_what_it_keeps_is_taken_from_the_slice(self, recorded: Program, gpu: SimulatedGpu) -> None:
        vectors = 512
        assert gpu.pools.nbytes() == 2 * MIB
        assert recorded.device.allocated == vectors + WORKSPACE + 2 * MIB

    @pytest.mark.parametrize(
        "how",
        [
            lambda program: program.device.recordings.forget(),
            lambda program: program.device.release_memory(),
            lambda program: program.run(codes.FREE_GRAPH, 0),
        ],
    )
    def test_it_is_given_back_but_for_the_workspace_of_its_stream(
        self, recorded: Program, gpu: SimulatedGpu, how: Any
    ) -> None:
        how(recorded)
        gc.collect()
        assert recorded.device.allocated == 512 + WORKSPACE and gpu.pools.nbytes() == 0

    def test_it_makes_room_for_tensors(self, recorded: Program) -> None:
        device = recorded.device
        recorded.run(codes.ALLOCATE, 99, device.limit - WORKSPACE - 4096, 0)
        assert not recorded.reports and device.allocated == device.limit - 3584
        recorded.read(recorded.call(self.w, self.w))

    def test_a_resize_is_not_refused_for_its_sake(self, recorded: Program) -> None:
        with recorded.device.recordings.resting():
            assert recorded.device.allocated == 512 + WORKSPACE
        assert recorded.read(recorded.call(self.w, self.w))

    def test_there_is_none_without_room(self, program: Program) -> None:
        program.run(codes.ALLOCATE, 99, program.device.limit - 4096, 0)
        program.define(POLYNOMIAL)
        w = program.vector(2.0)
        for _ in range(12):
            program.free(program.call(w, w))
        assert not program.is_recorded and not program.reports

    def test_it_ends_with_its_session(self, recorded: Program, gpu: SimulatedGpu) -> None:
        recorded.session.close()
        gc.collect()
        assert recorded.device.allocated == WORKSPACE and gpu.pools.nbytes() == 0

    def test_while_another_session_uses_the_slice_nothing_is_recorded(
        self, program: Program, gpu: SimulatedGpu
    ) -> None:
        other = Program(program.device)
        program.define(POLYNOMIAL)
        w = program.vector(2.0)
        for _ in range(40):
            program.call(w, w)
        assert not program.is_recorded and "aside waits for compute" not in gpu.log, "nor rehearsed"
        other.session.close()
        for _ in range(100):
            program.call(w, w)
        assert program.is_recorded

    def test_sessions_that_come_and_go_do_not_end_recording(self, program: Program) -> None:
        program.define(POLYNOMIAL)
        w, met = program.vector(2.0), 0
        for _ in range(4 * CALLS << MAX_RECORDINGS):
            if met > MAX_RECORDINGS:
                break
            if program.graph._rehearsed is not None:  # the next call would be recorded
                met += 1
                account = program.device.join()
                program.free(program.call(w, w))
                program.device.leave(account)
            else:
                program.free(program.call(w, w))
        assert met > MAX_RECORDINGS and not program.graph.objection and not program.is_recorded

    def test_nor_does_parking_after_which_everything_is_elsewhere(self, program: Program) -> None:
        program.define(RUNNING)
        x = program.vector(1.0)
        for _ in range(MAX_RECORDINGS + 2):
            w = program.vector(0.0)
            for _ in range(2 * CALLS):
                program.call(x, w)
            assert program.graph._kept.recording is not None
            program.device.release_memory()

    def test_nor_does_the_need_for_its_memory(self, recorded: Program) -> None:
        for _ in range(MAX_RECORDINGS + 2):
            assert recorded.device.recordings.forget()
            for _ in range(3 * CALLS + PAID_REPLAYS):
                recorded.free(recorded.call(self.w, self.w))
            assert recorded.is_recorded

    def test_nor_does_a_slice_that_was_full_once(self, program: Program) -> None:
        program.define(POLYNOMIAL)
        w = program.vector(2.0)
        program.run(
            codes.ALLOCATE, 99, program.device.limit - MIB, 0
        )  # room for tensors, not for a recording
        for _ in range(40):
            program.free(program.call(w, w))
        assert not program.is_recorded and not program.graph.objection
        program.free(99)
        for _ in range(40):
            program.free(program.call(w, w))
        assert program.is_recorded

    def test_all_is_given_back_where_one_recording_needs_the_memory_of_another(
        self, recorded: Program, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu.pools, "nbytes", lambda: 2 * MIB * len(gpu.pools.graphs))
        device = recorded.device
        recorded.run(codes.ALLOCATE, 99, device.limit - device.allocated - MIB, 0)
        recorded.define(RUNNING, id=1)
        v = recorded.vector(1.0)
        for _ in range(8):
            recorded.free(recorded.call(v, self.w, id=1))
        recorded.free(99)
        device.recordings.forget()
        assert device.allocated == 2 * 512 + WORKSPACE and not recorded.reports


def test_without_what_a_failed_capture_needs_nothing_is_recorded(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "release_pool", None)
    assert not gpu.device(500).recordings.are_made


#: Before it is replaced by the simulation.
MIN_RELEASE = cuda_graphs.MIN_RELEASE


@pytest.mark.parametrize(
    ("release", "records"), [("2.12.1+cu126", False), ("2.13.0", True), ("2.14.0.dev20260901", True)]
)
def test_in_releases_that_do_not_survive_a_failed_capture_nothing_is_recorded(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, release: str, records: bool
) -> None:
    monkeypatch.setattr(cuda_graphs, "MIN_RELEASE", MIN_RELEASE)
    monkeypatch.setattr(torch, "__version__", release)
    assert gpu.device(500).recordings.are_made is records
