"""How many calls may stay open at once, and that none is counted for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.core.errors import TooManyRequests
from jupyter_gpupool.server.access.authentication import Caller
from jupyter_gpupool.server.access.open_calls import OpenCallLimits

ADA = Caller("ada", False, "t-ada", "vision")
ADA_TOO = Caller("ada", False, "t-ada-2", "vision")
BOB = Caller("bob", False, "t-bob", "vision")
EVE = Caller("eve", False, "t-eve", "speech")
ROOT = Caller("root", True, "t-root", "vision")


def test_a_user_and_a_namespace_have_limits_of_their_own() -> None:
    limits = OpenCallLimits(per_user=2, per_namespace=3)
    first = limits.open(ADA)
    limits.open(ADA_TOO)
    with pytest.raises(TooManyRequests, match="this user's tokens together have 2") as refused:
        limits.open(ADA)
    assert refused.value.retry_after_s == 5
    limits.open(BOB)
    with pytest.raises(TooManyRequests, match="this namespace's tokens together have 3"):
        limits.open(BOB)
    limits.open(EVE)
    limits.open(ROOT)
    first()
    first()  # a connection may end twice
    limits.open(BOB)
    with pytest.raises(TooManyRequests):
        limits.open(ADA)


@given(st.lists(st.tuples(st.sampled_from([ADA, ADA_TOO, BOB, EVE]), st.booleans()), max_size=60))
def test_what_has_ended_leaves_room_whatever_came_between(calls: list[tuple[Caller, bool]]) -> None:
    limits, closes = OpenCallLimits(per_user=3, per_namespace=4), []
    for caller, ends in calls:
        try:
            closes.append(limits.open(caller))
        except TooManyRequests:
            pass
        if ends and closes:
            closes.pop(0)()
    for close in closes:
        close()
    assert not limits._open, "something is counted that is not open"


def test_only_a_call_that_waits_is_counted_and_only_while_it_does() -> None:
    limits = OpenCallLimits(per_user=1)
    with limits.waiting(ADA, 10.0):
        with limits.waiting(ADA, 0.0):
            pass
        with pytest.raises(TooManyRequests), limits.waiting(ADA, 1.0):
            pass
    with pytest.raises(ZeroDivisionError), limits.waiting(ADA, 1.0):
        raise ZeroDivisionError
    with limits.waiting(ADA, 1.0):
        pass
