"""One of several controllers leads, whatever their clocks and the API server do."""

from __future__ import annotations

import copy
import threading
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_gpupool.kubernetes.api_server import APIServer, APIServerError, Conflict
from jupyter_gpupool.kubernetes.leadership import DEADLINE_S, DURATION_S, RENEW_S, Leadership

from ..conftest import often


class Leases:
    """An API server with optimistic locking. ``is_down``: it answers nobody."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.is_down = False

    def find(self, path: str) -> dict[str, Any] | None:
        if self.is_down:
            raise APIServerError("the API server does not answer")
        return copy.deepcopy(self.lease)

    def create(self, path: str, wanted: dict[str, Any]) -> None:
        if self.lease is not None:
            raise Conflict("it exists")
        self._write(wanted)

    def replace(self, path: str, wanted: dict[str, Any]) -> None:
        if wanted["metadata"]["resourceVersion"] != str(self.version):
            raise Conflict("it has changed")
        self._write(wanted)

    def _write(self, wanted: dict[str, Any]) -> None:
        self.version += 1
        self.lease = copy.deepcopy(wanted)
        self.lease["metadata"]["resourceVersion"] = str(self.version)


class World:
    """Controllers of one cluster, at a time that the test sets."""

    def __init__(self, count: int = 2) -> None:
        self.now = 1000.0
        self.api = Leases()
        self.controllers = [
            Leadership(
                cast(APIServer, self.api), "gpus", "controller", name, threading.Event(), lambda: self.now
            )
            for name in "abc"[:count]
        ]

    def leading(self) -> list[int]:
        return [n for n, controller in enumerate(self.controllers) if controller.leads()]


def test_the_first_one_leads_and_another_takes_over_once_it_is_silent() -> None:
    world = World()
    first, second = world.controllers
    first.step()
    second.step()
    assert world.leading() == [0]
    world.now += DURATION_S - 0.1
    second.step()
    assert world.leading() == [], "the first has not renewed, so it stops before anybody else may start"
    world.now += 0.1
    second.step()
    first.step()
    assert world.leading() == [1]
    assert world.api.lease is not None
    assert world.api.lease["spec"]["leaseTransitions"] == 2


def test_one_that_resigns_is_followed_at_once() -> None:
    world = World()
    first, second = world.controllers
    first.step()
    second.step()
    second.resign()  # which holds nothing
    assert world.leading() == [0]
    first.resign()
    second.step()
    assert world.leading() == [1]


def test_one_that_cannot_renew_stops_by_itself() -> None:
    world = World(1)
    (only,) = world.controllers
    only.step()
    world.api.is_down = True
    world.now += DEADLINE_S
    with pytest.raises(APIServerError):
        only.step()
    assert world.leading() == []
    world.api.is_down = False
    only.step()
    assert world.leading() == [0]


EVENTS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 2)),
    st.tuples(st.just("resign"), st.integers(0, 2)),
    st.tuples(st.just("pass"), st.sampled_from([0.1, RENEW_S, DEADLINE_S, DURATION_S])),
    st.tuples(st.just("down"), st.booleans()),
)


@pytest.mark.soak
@settings(max_examples=often(200, 5000), deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_never_do_two_lead_at_once(events: list[tuple[str, Any]]) -> None:
    world = World(3)
    for what, of in events:
        if what == "pass":
            world.now += of
        elif what == "down":
            world.api.is_down = of
        else:
            try:
                getattr(world.controllers[of], what)()
            except APIServerError:
                pass
        assert len(world.leading()) <= 1
