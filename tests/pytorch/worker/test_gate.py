"""Whoever wants to be alone with a worker's memory waits for exchanges that have begun, and lets in what they need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.worker.collectives import Call, Meetings, Part
from jupyter_gpupool.pytorch.worker.gate import Gate
from jupyter_gpupool.pytorch.worker.messages import Messages
from jupyter_gpupool.pytorch.worker.shared_storages import SharedStorages

GROUP = b"g" * 16


def begun(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


class Ranks:
    """Sessions that meet in one worker, each frame of which is one collective."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.meetings = Meetings()
        self.members = [object() for _ in range(2)]
        self.done = [0, 0]

    def meet(self, rank: int, number: int) -> None:
        member = self.members[rank]
        self.gate.enter(None, lambda: self.meetings.wait_for(member))
        try:
            place = (GROUP, 2, rank, number)
            self.meetings.meet(member, place, Call("all_reduce", "SUM", -1), Part((), ()), 300.0)
            self.done[rank] += 1
        finally:
            self.gate.leave()


@pytest.mark.parametrize("is_first", [True, False], ids=["first collective", "later one"])
@pytest.mark.parametrize("how", ["close", "hold"])
def test_a_rank_that_waits_in_a_collective_gets_the_other_one_and_no_next_collective_begins(
    how: str, is_first: bool, eventually: Callable[..., Any]
) -> None:
    ranks = Ranks()
    first = 0 if is_first else 1
    if not is_first:
        former = [begun(lambda k=k: ranks.meet(k, 0)) for k in range(2)]
        for thread in former:
            thread.join(300)
    waiting = begun(lambda: ranks.meet(0, first))
    eventually(lambda: ranks.gate._inside == 1, "a rank waits inside")
    closed: list[bool] = []
    closing = begun(lambda: ranks.gate.hold() if how == "hold" else closed.append(ranks.gate.close(300.0)))
    eventually(lambda: ranks.gate._is_shut, "nobody is let in without need")
    came = begun(lambda: ranks.meet(1, first))
    for thread in (waiting, came, closing):
        thread.join(300)
        assert not thread.is_alive()
    assert ranks.done == [first + 1] * 2
    begun(lambda: ranks.meet(0, first + 1))
    if how == "close":
        assert closed == [True]
        assert ranks.gate._inside == 0
        ranks.gate.open()
    else:
        resting, uses = ranks.gate.rest()
        assert resting and ranks.gate.rest() == (True, uses), "nobody waits for it"
        ranks.gate.release()
    begun(lambda: ranks.meet(1, first + 1))
    eventually(lambda: ranks.done == [first + 2] * 2, "both go on")


def test_a_rank_for_which_none_comes_lets_nobody_be_alone(eventually: Callable[..., Any]) -> None:
    ranks = Ranks()
    begun(lambda: ranks.meet(0, 0))
    eventually(lambda: ranks.gate._inside == 1, "a rank waits inside")
    assert not ranks.gate.close(0.05)
    ranks.gate.hold()
    assert ranks.gate.rest()[0] is False
    ranks.gate.release()
    ranks.meet(1, 0)


def test_who_receives_waits_for_the_session_that_sends_and_for_any_where_that_is_not_known() -> None:
    messages = Messages(SharedStorages())
    sender, other, box = object(), object(), b"b" * 16
    assert not messages.wait_for(sender, ())
    assert messages.wait_for(sender, [box]) and messages.wait_for(other, [box])
    messages.join(sender, box)
    assert messages.wait_for(sender, [box]) and not messages.wait_for(other, [box])
