"""Recorded graphs: when a graph is recorded, and what a replay computes, against a simulated driver."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker.graph_replay import (  # noqa: E402
    CALLS,
    MAX_PATIENCE,
    MAX_RECORDINGS,
    PAID_REPLAYS,
    Habits,
    Plan,
    objection,
    prevents,
    saved_us,
)
from jupyter_gpupool.pytorch.worker.graph_steps import GraphSteps  # noqa: E402

from ...support.graph_programs import (  # noqa: E402
    POLYNOMIAL,
    RANDOM,
    RUNNING,
    VECTOR,
    N,
    Program,
    definition,
    plain,
    step,
    steps_of,
)
from ...support.simulated_cuda import SimulatedGpu  # noqa: E402


class TestHabits:
    def test_an_input_that_stays_is_told_from_one_that_moves(self) -> None:
        habits = Habits()
        for k in range(CALLS):
            assert habits.expect() is None
            habits.note((10 + k, 7), as_expected=False)
        plan = habits.expect()
        assert plan is not None and plan.moving == (0,)
        assert plan.fits((99, 7)) and not plan.fits((99, 8))
        assert habits.expect() is None, "once"

    def test_one_that_has_moved_once_is_no_habit(self) -> None:
        habits = Habits()
        for address in [7] * CALLS:
            habits.note((address,), as_expected=False)
        assert (plan := habits.expect()) is not None and not plan.moving
        for _ in range(CALLS):
            assert habits.expect() is None
            habits.note((8,), as_expected=False)
        assert (plan := habits.expect()) is not None and not plan.moving and plan.fits((8,))

    def test_inputs_that_take_turns_move(self) -> None:
        habits = Habits()
        for k in range(2 * CALLS):
            habits.note((7 + k % 2,), as_expected=False)
        assert (plan := habits.expect()) is not None and plan.moving == (0,)

    def test_what_is_of_no_use_is_asked_for_ever_more_rarely(self) -> None:
        habits, asked = Habits(), []
        for k in range(100):
            habits.note((7,), as_expected=False)
            if habits.expect() is not None:
                asked.append(k)
                habits.look_later()
        assert asked == [2, 8, 20, 44, 92]
        for k in range(100, 10 * MAX_PATIENCE):
            habits.note((7,), as_expected=False)
            if habits.expect() is not None:
                asked.append(k)
                habits.look_later()
        assert asked[-1] - asked[-2] == MAX_PATIENCE, "but it is"

    def test_a_plan_fits_where_all_that_stays_is_in_its_place(self) -> None:
        plan = Plan((0,), (0, 7, 8))
        assert plan.fits((1, 7, 8)) and plan.fits((2, 7, 8)) and not plan.fits((1, 7, 9))


class TestWhatIsRecorded:
    def test_copies_are_weighed_against_operators_that_need_not_be_started(self) -> None:
        assert saved_us(200, [600_000, 4_000]) > 0, "one image through ResNet-50"
        assert saved_us(400, [200 << 20] * 50) < 0, "a batch of 256, whose activations are results"
        assert saved_us(1, [4]) < 0

    def test_inputs_that_are_written_to_must_stay(self) -> None:
        graph = steps_of(RUNNING)
        assert graph.written == {1}
        assert not prevents(graph, Plan((0,), (0, 7)))
        assert "writes" in prevents(graph, Plan((1,), (7, 0)))

    def test_writes_to_views_of_inputs_are_found(self) -> None:
        graph = steps_of(
            definition(
                step("aten::view.default", ["n", 1], ["l", [N]], number=1),
                step("aten::mul_.Tensor", ["n", 2], ["n", 0], number=1),
            )
        )
        assert graph.written == {1}

    def test_statistics_that_an_operator_updates_count_as_written(self) -> None:
        row = [[1, N], [N, 1], 0, "float32", 0]
        args = [["n", 0], None, None, ["n", 1], None, True, ["f", 0.1], ["f", 0.1]]
        results = ["l", [["r", 2, row], ["r", 3, VECTOR], ["r", 4, VECTOR]]]
        graph = steps_of(definition([["aten::native_batch_norm.default", args, {}], results]))
        assert 1 in graph.written

    @pytest.mark.parametrize(
        ("graph", "words"),
        [
            ({**POLYNOMIAL, "record": False}, "does not want"),
            (definition(step("aten::nonzero.default", ["n", 0], number=2)), "depend on elements"),
            (definition(step("aten::_local_scalar_dense.default", ["n", 0], number=2)), "depend on elements"),
            (definition(inputs=2, returned=[]), "no operators"),
        ],
    )
    def test_objections(self, graph: Any, words: str) -> None:
        assert words in objection(steps_of(graph))

    def test_nothing_is_objected_to_random_numbers(self) -> None:
        assert not objection(steps_of(RANDOM))


class TestReplay:
    def test_inputs_move_and_results_stay(self, program: Program) -> None:
        reference, results = plain(), []
        for one in (program, reference):
            one.define(POLYNOMIAL)
            w, kept = one.vector(2.0, 0.5), []
            for k in range(20):
                x = one.vector(0.1 * k, -0.2)
                kept.append(one.call(x, w))
                if k % 3:
                    one.free(x)
            results.append([one.read(id) for id in kept])
        assert program.is_recorded and not reference.is_recorded
        assert results[0] == results[1] and not program.reports

    def test_an_operator_is_not_called_any_more(
        self, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program.define(POLYNOMIAL)
        w = program.vector(2.0)
        for _ in range(6):
            program.call(program.vector(1.0), w)
        monkeypatch.setattr(GraphSteps, "run", lambda *args: pytest.fail("it was run operator by operator"))
        program.call(program.vector(1.0), w)

    def test_what_it_writes_is_written_once_a_call(self, program: Program) -> None:
        program.define(RUNNING)
        x, w = program.vector(1.0), program.vector(0.0)
        for k in range(12):
            result = program.call(x, w)
            assert program.read(w) == [k + 1.0] * N
            assert program.read(result) == [(k + 1.0) ** 2] * N
        assert program.is_recorded

    def test_a_parameter_that_is_replaced_is_not_read_any_more(self, program: Program) -> None:
        program.define(POLYNOMIAL)
        reference = plain()
        reference.define(POLYNOMIAL)
        for one in (program, reference):
            x, w = one.vector(0.3), one.vector(2.0)
            results = [one.call(x, w) for _ in range(8)]
            v = one.vector(5.0)
            results += [one.call(x, v) for _ in range(8)]
            results.append(one.call(x, w))
            one.results = [one.read(id) for id in results]  # type: ignore[attr-defined]
        assert program.results == reference.results  # type: ignore[attr-defined]

    def test_elements_that_are_written_in_place_are_seen(self, program: Program) -> None:
        program.define(POLYNOMIAL)
        x, w = program.vector(1.0), program.vector(0.0)
        for k in range(8):
            program.write(w, float(k) / 10)
            program.write(x, 1.0)
            got = program.read(program.call(x, w))
            y = torch.tensor(float(k) / 10)
            assert got == pytest.approx([float(((y + 1) * y).sin().exp())] * N)

    def test_random_numbers_go_on_as_without_a_recording(self, program: Program) -> None:
        found = []
        for one in (program, plain()):
            one.define(RANDOM)
            one.run(codes.SEED, 5, -1)
            x, w = one.vector(1.0, 2.0), one.vector(3.0)
            found.append([one.read(one.call(x, w)) for _ in range(12)])
        assert program.is_recorded and found[0] == found[1]

    def test_two_graphs_share_memory_and_results_are_their_own(self, program: Program) -> None:
        program.define(POLYNOMIAL)
        program.define(RUNNING, id=1)
        x, w, v = program.vector(0.5), program.vector(1.0), program.vector(0.0)
        expected = program.read(program.call(x, w))
        kept = []
        for _ in range(10):
            kept.append(program.call(x, w))
            program.call(x, v, id=1)
        assert [program.read(id) for id in kept] == [expected] * 10
        assert program.session.graphs.states()[0] == ["recorded", "recorded"]

    def test_an_input_that_moves_onto_what_is_written_is_not_copied_first(self, program: Program) -> None:
        program.define(RUNNING)
        w = program.vector(1.0)
        for _ in range(8):
            program.call(program.vector(1.0), w)
        assert program.is_recorded
        before = program.read(w)[0]
        program.call(w, w)  # w += w
        assert program.read(w) == [2 * before] * N

    @pytest.mark.parametrize(
        ("strides", "columns"), [([0, 1], N), ([1, 1], 5)], ids=["expanded", "windows that overlap"]
    )
    def test_inputs_move_that_have_elements_more_than_once(
        self, program: Program, strides: list[int], columns: int
    ) -> None:
        wide = [[4, columns], strides, 0, "float32", 0]
        row, whole = [[columns], [1], 0, "float32", 0], [[4, columns], [columns, 1], 0, "float32", 0]
        steps = [step("aten::mul.Tensor", ["n", 0], ["n", 1], number=2, geometry=whole)]
        steps += [step("aten::neg.default", ["n", k], number=k + 1, geometry=whole) for k in range(2, 6)]
        graph = {**definition(*steps, returned=[[6, whole, 16 * columns]]), "inputs": [wide, row]}
        results = []
        for one in (program, plain()):
            one.define(graph)
            w = one.vector(2.0, 0.5)
            results.append([one.read(one.call(one.vector(k, -k / 8), w), whole) for k in range(12)])
        assert program.is_recorded and not program.reports
        assert results[0] == results[1]

    def test_a_recording_whose_inputs_never_rest_is_given_up(self, program: Program) -> None:
        program.define(RUNNING)
        x = program.vector(1.0)
        for _ in range(MAX_RECORDINGS + 2):
            w = program.vector(0.0)
            for k in range(2 * CALLS):
                program.call(x, w)
                assert program.read(w) == [k + 1.0] * N
        assert not program.is_recorded and "again and again" in program.graph.objection

    def test_one_that_has_paid_is_made_again_whenever_its_inputs_move(self, program: Program) -> None:
        program.define(RUNNING)
        x = program.vector(1.0)
        for _ in range(MAX_RECORDINGS + 2):
            w = program.vector(0.0)
            for _ in range(CALLS + PAID_REPLAYS):
                program.free(program.call(x, w))
            assert program.is_recorded

    @settings(max_examples=40, deadline=None)
    @given(
        calls=st.lists(
            st.tuples(
                st.integers(0, 1), st.sampled_from([0, 0, 0, 0, 1, 2]), st.sampled_from([3, 3, 3, 3, 0, 1, 2])
            ),
            min_size=10,
            max_size=40,
        ),
        forgotten=st.integers(0, 40),
    )
    def test_any_calls_compute_what_they_do_without(self, calls: Any, forgotten: int) -> None:
        results = []
        with pytest.MonkeyPatch.context() as patch:
            gpu = SimulatedGpu()
            gpu.install(patch)
            for one in (Program(gpu.device(500)), plain()):
                results.append(self.all_that_is_there(one, calls, forgotten))
        assert torch.equal(*(torch.tensor(r).nan_to_num() for r in results))

    @staticmethod
    def all_that_is_there(one: Program, calls: Any, forgotten: int) -> list[list[float]]:
        one.define(POLYNOMIAL)
        one.define(RUNNING, id=1)
        vectors, found = [one.vector(0.1 * k) for k in range(4)], []
        for k, (graph, x, w) in enumerate(calls):
            if k == forgotten:
                one.device.recordings.forget()
            found.append(one.call(vectors[x], vectors[w], id=graph))
        return [one.read(id) for id in (*found, *vectors)]


def test_an_emulated_gpu_records_nothing() -> None:
    program = plain()
    program.define(POLYNOMIAL)
    w = program.vector(1.0)
    for _ in range(10):
        program.call(w, w)
    assert not program.is_recorded and program.graph.objection == "its device does not record"
