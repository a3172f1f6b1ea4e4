"""How many calls a second are admitted, and that who waits as told is admitted then."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traitlets import TraitError
from traitlets.config import Config

from jupyter_gpupool.core.errors import TooManyRequests
from jupyter_gpupool.server.access import rates
from jupyter_gpupool.server.access.authentication import Caller
from jupyter_gpupool.server.access.rates import BURST_S, RateLimits, kind_of

from ...conftest import often

ADA = Caller("ada", False, "t-ada", "vision")
ADA_TOO = Caller("ada", False, "t-ada-2", "vision")
BOB = Caller("bob", False, "t-bob", "vision")
EVE = Caller("eve", False, "t-eve", "speech")
ROOT = Caller("root", True, "t-root")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, **traits: dict[str, float]) -> RateLimits:
    none: dict[str, float] = {}
    return RateLimits(clock, **{"per_token": none, "per_user": none, "per_namespace": none, **traits})


CALLS = st.lists(
    st.tuples(
        st.floats(0, 4) | st.just(0.0),
        st.sampled_from([ADA, ADA_TOO, BOB, EVE, ROOT]),
        st.sampled_from(rates.KINDS),
    ),
    max_size=120,
)


@pytest.mark.soak
@settings(max_examples=often(200, 10_000))
@given(CALLS, st.floats(0.3, 8), st.floats(0.3, 8), st.floats(0.3, 8))
def test_no_group_makes_more_calls_than_allowed_in_any_stretch_of_time(
    calls: list[tuple[float, Caller, str]], token: float, user: float, namespace: float
) -> None:
    clock = Clock()
    per_s = {"token": token, "user": user, "namespace": namespace}
    limited = limits(
        clock, **{f"per_{scope}": dict.fromkeys(rates.KINDS, rate) for scope, rate in per_s.items()}
    )
    admitted: list[tuple[float, Caller, str]] = []
    for pause, caller, kind in calls:
        clock.now += pause
        try:
            limited.admit(caller, kind)
        except TooManyRequests as e:
            assert not caller.administers
            clock.now += e.retry_after_s + 1e-9
            if (
                caller.token == "t-eve"
            ):  # the only one of all its groups: what it was told holds for all of them
                for scope in rates.SCOPES:
                    group = _group(caller, scope)
                    recent = [at for at, one, k in admitted if _group(one, scope) == group and k == kind]
                    assert recent, "it was refused before it had called at all"
        else:
            admitted.append((clock.now, caller, kind))
    for scope in rates.SCOPES:
        burst = max(1, math.floor(per_s[scope] * BURST_S))
        for group, kind in {(_group(c, scope), k) for _, c, k in admitted if not c.administers}:
            times = [at for at, c, k in admitted if _group(c, scope) == group and k == kind]
            for i, first in enumerate(times):
                for j in range(i, len(times)):
                    assert j - i + 1 <= burst + (times[j] - first) * per_s[scope] + 1e-6


def _group(caller: Caller, scope: str) -> str | None:
    return {"token": caller.token, "user": caller.owner, "namespace": caller.namespace}[scope]


@given(st.floats(0.01, 1e6), st.integers(0, 30))
def test_who_waits_as_told_is_admitted(per_s: float, more: int) -> None:
    clock = Clock()
    limited = limits(clock, per_user={"changes": per_s})
    if per_s * BURST_S > 1000:
        return
    for _ in range(max(1, math.floor(per_s * BURST_S))):
        limited.admit(ADA, "changes")
    for _ in range(more):
        with pytest.raises(TooManyRequests) as refused:
            limited.admit(ADA_TOO, "changes")
        clock.now += refused.value.retry_after_s + 1e-9 * clock.now
        limited.admit(ADA_TOO, "changes")


def test_groups_and_kinds_have_limits_of_their_own() -> None:
    limited = limits(Clock(), per_token={"reads": 1}, per_user={"reads": 1.6, "renewals": 0.4})
    counts: Counter[str] = Counter()
    for caller in (ADA, ADA_TOO, BOB, ROOT):
        for _ in range(9):
            try:
                limited.admit(caller, "reads")
            except TooManyRequests:
                continue
            counts[caller.token] += 1
    assert counts == {"t-ada": 5, "t-ada-2": 3, "t-bob": 5, "t-root": 9}
    left = limited.admit(ADA, "renewals")
    assert left is not None and left.calls == 1
    assert limited.admit(ADA, "changes") is None  # that kind has no limit
    with pytest.raises(
        TooManyRequests, match="this user's tokens together may make 0.4 heartbeats and releases"
    ):
        for _ in range(2):
            limited.admit(ADA, "renewals")


def test_a_refused_call_costs_nothing() -> None:
    clock = Clock()
    limited = limits(clock, per_token={"reads": 0.2}, per_user={"reads": 100})
    for _ in range(1000):
        try:
            limited.admit(ADA, "reads")
        except TooManyRequests:
            pass
    left = limited.admit(ADA_TOO, "reads")
    assert left is not None and left.scope == "token"
    clock.now += 5
    assert limited.admit(ADA, "reads") is not None


def test_what_is_left_is_that_of_the_closest_limit() -> None:
    limited = limits(Clock(), per_token={"reads": 100}, per_namespace={"reads": 2})
    left = limited.admit(ADA, "reads")
    assert left is not None
    assert dict(left.headers()) == {
        "RateLimit-Policy": '"namespace-reads";q=10;w=5',
        "RateLimit": '"namespace-reads";r=9;t=1',
    }


def test_the_memory_for_counts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_MAX_BUCKETS", 10)
    limited = limits(Clock(), per_token={"reads": 0.2})
    for k in range(100):
        limited.admit(Caller("ada", False, f"t-{k}"), "reads")
    assert len(limited._buckets) == 10
    with pytest.raises(TooManyRequests):
        limited.admit(Caller("ada", False, "t-99"), "reads")


@pytest.mark.parametrize(
    "value", [{"reads": 0}, {"reads": -1}, {"reads": float("nan")}, {"all": 5}, {"reads": "5"}]
)
def test_a_wrong_limit_is_refused_with_what_is_right(value: dict[str, object]) -> None:
    with pytest.raises(
        TraitError, match="RateLimits.per_user: give calls per second above 0 for reads, changes"
    ):
        RateLimits(config=Config({"RateLimits": {"per_user": value}}))


@pytest.mark.parametrize(
    ("method", "renewing", "kind"),
    [
        ("GET", ("GET", "DELETE"), "reads"),
        ("DELETE", ("GET", "DELETE"), "renewals"),
        ("PATCH", ("GET", "DELETE"), "changes"),
        ("POST", ("POST",), "renewals"),
        ("POST", (), "changes"),
    ],
)
def test_the_kind_of_a_call(method: str, renewing: tuple[str, ...], kind: str) -> None:
    assert kind_of(method, renewing) == kind
