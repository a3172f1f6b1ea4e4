"""Ranks that meet in a worker: what each gets, in whatever order they come, and what they hear of those who do not."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.worker.collectives import Call, Meetings, Part  # noqa: E402
from jupyter_gpupool.pytorch.worker.templates import BadRecord  # noqa: E402

GROUP = b"g" * 16
SESSIONS = [object() for _ in range(3)]


def together(
    meetings: Meetings, call: Call, parts: Sequence[Any], order: Sequence[int], number: int = 0
) -> list[Exception | None]:
    """Every rank's failure, if it has one. Ranks begin in ``order``, each once the one before waits."""
    failures: list[Exception | None] = [None] * len(parts)

    def rank(r: int) -> None:
        try:
            meetings.meet(SESSIONS[r], (GROUP, len(parts), r, number), call, parts[r], 60.0)
        except Exception as e:
            failures[r] = e

    threads = []
    for r in order:
        threads.append(threading.Thread(target=rank, args=(r,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return failures


def test_sums_are_the_same_in_whatever_order_ranks_come() -> None:
    values = [torch.tensor([1e8, 0.1]), torch.tensor([1.0, 0.2]), torch.tensor([-1e8, 0.3])]
    expected = (values[0] + values[1]) + values[2]
    meetings = Meetings()
    for number, order in enumerate(itertools.permutations(range(3))):
        mine = [v.clone() for v in values]
        parts = [Part([t], [t]) for t in mine]
        assert together(meetings, Call("all_reduce", "SUM", -1), parts, order, number) == [None] * 3
        assert all(torch.equal(t, expected) for t in mine)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("SUM", [7, 9]),
        ("PRODUCT", [10, 14]),
        ("MIN", [2, 2]),
        ("MAX", [5, 7]),
        ("BAND", [0, 2]),
        ("BOR", [7, 7]),
        ("BXOR", [7, 5]),
    ],
)
def test_reductions_of_integers(operation: str, expected: list[int]) -> None:
    tensors = [torch.tensor([5, 7]), torch.tensor([2, 2])]
    outs = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    parts = [Part([t], [out]) for t, out in zip(tensors, outs)]
    assert together(Meetings(), Call("all_reduce", operation, -1), parts, (1, 0)) == [None, None]
    assert outs[0].tolist() == outs[1].tolist() == expected


def test_ranks_that_share_memory_get_the_sum_of_what_was_there() -> None:
    for shared in ((0, 2), (1, 2), (0, 1, 2)):
        own = [torch.tensor([float(10**r)]) for r in range(3)]
        common = torch.tensor([7.0])
        tensors = [common.view(1) if r in shared else own[r] for r in range(3)]
        expected = sum(t.item() for t in tensors)
        parts = [Part([t], [t]) for t in tensors]
        assert together(Meetings(), Call("all_reduce", "SUM", -1), parts, (0, 1, 2)) == [None] * 3
        assert [t.item() for t in tensors] == [expected] * 3


def test_what_is_reduced_elsewhere_stays_as_it_was() -> None:
    tensors, outs = [torch.tensor([1.0]), torch.tensor([2.0])], [torch.zeros(1), torch.zeros(1)]
    parts = [Part([t], [out]) for t, out in zip(tensors, outs)]
    assert together(Meetings(), Call("all_reduce", "SUM", -1), parts, (0, 1)) == [None, None]
    assert [t.item() for t in (*tensors, *outs)] == [1, 2, 3, 3]
    whole = [torch.tensor([1]), torch.tensor([2])]
    failures = together(Meetings(), Call("all_reduce", "AVG", -1), [Part([t], [t]) for t in whole], (0, 1))
    assert all("reduce with SUM, and divide" in str(f) for f in failures)
    assert [t.item() for t in whole] == [1, 2]


def test_a_mean_and_a_reduction_to_one_rank() -> None:
    tensors = [torch.tensor([1.0]), torch.tensor([2.0])]
    parts = [Part([tensors[0]], []), Part([tensors[1]], [tensors[1]])]
    assert together(Meetings(), Call("all_reduce", "AVG", 1), parts, (0, 1)) == [None, None]
    assert [t.item() for t in tensors] == [1.0, 1.5]


def test_exchanges() -> None:
    meetings = Meetings()
    rows = [torch.tensor([10.0 * r + k for k in range(3)]) for r in range(3)]
    got = [torch.zeros(3) for _ in range(3)]
    parts = [Part(rows[r].split(1), got[r].split(1)) for r in range(3)]
    assert together(meetings, Call("all_to_all", "", -1), parts, (2, 0, 1)) == [None] * 3
    assert [t.tolist() for t in got] == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]

    into = [torch.zeros(9) for _ in range(3)]
    parts = [Part([rows[r]], into[r].chunk(3)) for r in range(3)]
    assert together(meetings, Call("gather", "", -1), parts, (0, 1, 2), 1) == [None] * 3
    assert all(t.tolist() == torch.cat(rows).tolist() for t in into)

    one = [torch.zeros(1) for _ in range(3)]
    parts = [Part(rows[r].split(1) if r == 1 else [], [one[r]]) for r in range(3)]
    assert together(meetings, Call("scatter", "", 1), parts, (0, 1, 2), 2) == [None] * 3
    assert [t.item() for t in one] == [10, 11, 12]

    parts = [Part(rows[r].split(1), [one[r]]) for r in range(3)]
    assert together(meetings, Call("reduce_scatter", "MAX", -1), parts, (0, 2, 1), 3) == [None] * 3
    assert [t.item() for t in one] == [20, 21, 22]

    parts = [Part([rows[r]] if r == 2 else [], [rows[r]]) for r in range(3)]
    assert together(meetings, Call("broadcast", "", 2), parts, (2, 1, 0), 4) == [None] * 3
    assert all(t.tolist() == [20, 21, 22] for t in rows)
    assert not meetings._groups[GROUP].meetings


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 waited 0 s in all_reduce\(SUM\) for ranks 0, 2"):
        Meetings().meet("s", (GROUP, 3, 1, 0), Call("all_reduce", "SUM", -1), Part([], []), 0.0)


def test_who_has_ended_is_named_to_those_who_wait_and_to_those_who_come() -> None:
    meetings = Meetings()
    call = Call("broadcast", "", 0)
    t = torch.zeros(1)
    assert together(meetings, call, [Part([t], [t]), Part([], [t])], (0, 1)) == [None, None]
    failures: list[Exception] = []

    def wait() -> None:
        try:
            meetings.meet(SESSIONS[0], (GROUP, 2, 0, 1), call, Part([t], [t]), 600.0)
        except RuntimeError as e:
            failures.append(e)

    waiting = threading.Thread(target=wait)
    waiting.start()
    meetings.leave(SESSIONS[1])
    waiting.join()
    assert str(failures[0]) == "rank 1 has ended or left the lease"
    with pytest.raises(RuntimeError, match="rank 1 has ended"):
        meetings.meet(SESSIONS[0], (GROUP, 2, 0, 2), call, Part([t], [t]), 600.0)
    meetings.leave(SESSIONS[0])
    assert not meetings._groups


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([([2], [2]), ([3], [3])], "rank 1 has 3 elements of torch.float32 where rank 0 has 2"),
        ([([2], [2]), ([2, 2], [2, 2])], "different numbers of tensors: \\[1, 2\\]"),
        ([([2], [1]), ([2], [2])], "2 elements of torch.float32 for a tensor of 1"),
    ],
)
def test_tensors_that_do_not_fit_fail_for_every_rank(parts: Any, message: str) -> None:
    made = [Part([torch.zeros(n) for n in ins], [torch.zeros(n) for n in outs]) for ins, outs in parts]
    failures = together(Meetings(), Call("all_reduce", "SUM", -1), made, (0, 1))
    for failure in failures:
        assert isinstance(failure, ValueError)
        with pytest.raises(ValueError, match=message):
            raise failure


def test_a_rank_that_cannot_take_part_tells_the_others_why() -> None:
    t = torch.zeros(1)
    failures = together(
        Meetings(), Call("all_reduce", "SUM", -1), [Part([t], [t]), RuntimeError("its input failed")], (0, 1)
    )
    assert [str(f) for f in failures] == ["rank 1 cannot take part: its input failed"] * 2


def test_ranks_that_call_different_things_hear_of_it(eventually: Callable[..., Any]) -> None:
    meetings, t = Meetings(), torch.zeros(1)
    failures: list[str] = []

    def call(r: int, what: Call) -> None:
        try:
            meetings.meet(SESSIONS[r], (GROUP, 2, r, 0), what, Part([t], [t]), 60.0)
        except RuntimeError as e:
            failures.append(str(e))

    def waits() -> bool:
        with meetings._changed:
            return GROUP in meetings._groups

    first = threading.Thread(target=call, args=(0, Call("all_reduce", "SUM", -1)))
    first.start()
    eventually(waits, "the first rank's part")
    call(1, Call("all_reduce", "MAX", -1))
    first.join()
    assert failures == ["rank 1 calls all_reduce(MAX) where others call all_reduce(SUM)"] * 2


def test_nobody_takes_anothers_rank() -> None:
    meetings, t = Meetings(), torch.zeros(1)
    call = Call("all_reduce", "SUM", -1)
    assert together(meetings, call, [Part([t], [t]), Part([t.clone()], [t])], (0, 1)) == [None, None]
    with pytest.raises(BadRecord):
        meetings.meet("somebody", (GROUP, 2, 1, 1), call, Part([t], [t]), 1.0)
    with pytest.raises(BadRecord):
        meetings.meet(SESSIONS[0], (GROUP, 3, 0, 1), call, Part([t], [t]), 1.0)
    with pytest.raises(BadRecord, match="a reduction named"):
        meetings.meet("one", (b"x" * 16, 1, 0, 0), Call("all_reduce", "XOR", -1), Part([t], [t]), 1.0)
    with pytest.raises(BadRecord, match="a collective named"):
        meetings.meet("one", (b"x" * 16, 1, 0, 1), Call("all_shuffle", "", -1), Part([t], [t]), 1.0)
