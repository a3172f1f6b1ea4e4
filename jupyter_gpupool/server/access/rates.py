"""How many calls a second a token, a user and a namespace may make: token buckets, and which calls share one."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from traitlets import Dict, TraitError, validate
from traitlets.config import Configurable

from jupyter_gpupool.core.errors import TooManyRequests

from .authentication import READS, Caller

#: Calls that read, that change something, and that keep or release what the caller has. Each kind has its own limits,
#: so that a program that asks too often does not lose its leases.
KINDS = ("reads", "changes", "renewals")
#: Who is limited, from the smallest group of callers to the largest.
SCOPES = ("token", "user", "namespace")
#: The calls that may be made at once, in seconds of the rate.
BURST_S = 5.0
#: The most tokens, users and namespaces whose calls are counted. One that was forgotten may burst again.
_MAX_BUCKETS = 20_000


def kind_of(method: str, renewing: Sequence[str]) -> str:
    """Return the kind of a call. ``renewing``: the methods of its path that keep or release the caller's leases."""
    if method in READS:
        return "reads"
    return "renewals" if method in renewing else "changes"


@dataclass(frozen=True)
class Left:
    """What a caller may still do by the limit that is closest: ``calls`` at once, all ``burst`` after ``reset_s``."""

    scope: str
    kind: str
    per_s: float
    burst: int
    calls: int
    reset_s: float

    def headers(self) -> Iterator[tuple[str, str]]:
        """The header fields of draft-ietf-httpapi-ratelimit-headers."""
        name = f'"{self.scope}-{self.kind}"'
        yield "RateLimit-Policy", f"{name};q={self.burst};w={math.ceil(self.burst / self.per_s)}"
        yield "RateLimit", f"{name};r={self.calls};t={math.ceil(self.reset_s)}"


class Bucket:
    """Fills with ``per_s`` calls a second up to ``burst``."""

    __slots__ = ("per_s", "burst", "_calls", "_at")

    def __init__(self, per_s: float, now: float) -> None:
        self.per_s = per_s
        self.burst = max(1, math.floor(per_s * BURST_S))
        self._calls = float(self.burst)
        self._at = now

    def calls(self, now: float) -> float:
        """Return how many calls it holds."""
        if now > self._at:
            self._calls = min(self.burst, self._calls + (now - self._at) * self.per_s)
            self._at = now
        return self._calls

    def take(self) -> None:
        """Take out one call."""
        self._calls -= 1.0

    def wait_s(self, calls: float) -> float:
        """Return how long it takes until it holds so many calls, in seconds."""
        return max(0.0, calls - self._calls) / self.per_s


class RateLimits(Configurable):
    """The limits of one server, each for itself, on calls per second. Administrators' calls are not limited."""

    per_token = Dict(
        {"reads": 100, "changes": 50, "renewals": 200},
        help="Calls per second of one token: `reads`, `changes`, and `renewals`, which are heartbeats and releases. "
        "Five seconds' worth may come at once. A kind that is missing is not limited.",
    ).tag(config=True)
    per_user = Dict(
        {"reads": 200, "changes": 100, "renewals": 400},
        help="Calls per second of one user, by all tokens together; as `per_token`.",
    ).tag(config=True)
    per_namespace = Dict(
        {"reads": 1000, "changes": 300, "renewals": 2000},
        help="Calls per second of one namespace's tokens together; as `per_token`.",
    ).tag(config=True)

    def __init__(self, clock: Callable[[], float] = time.monotonic, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str, str], Bucket] = OrderedDict()

    @validate("per_token", "per_user", "per_namespace")
    def _check(self, proposal: Any) -> Mapping[str, float]:
        for kind, rate in proposal["value"].items():
            if (
                kind not in KINDS
                or isinstance(rate, bool)
                or not isinstance(rate, (int, float))
                or not 0 < rate < 1e9
            ):
                raise TraitError(
                    f"RateLimits.{proposal['trait'].name}: give calls per second above 0 for {', '.join(KINDS)}; "
                    f"not {kind!r}: {rate!r}"
                )
        return dict(proposal["value"])

    def admit(self, caller: Caller, kind: str) -> Left | None:
        """Count a call; return what is left by the closest limit, None if there is none. Raises TooManyRequests."""
        if caller.administers:
            return None
        now = self._clock()
        found = list(self._of(caller, kind, now))
        if not found:
            return None
        for scope, bucket in found:
            if bucket.calls(now) < 1.0:
                raise TooManyRequests(
                    f"{_WHOSE[scope]} may make {bucket.per_s:g} {_WHAT[kind]} per second; make fewer, or ask the "
                    f"pool's administrator for a higher limit",
                    bucket.wait_s(1.0),
                )
        for _, bucket in found:
            bucket.take()
        scope, bucket = min(found, key=lambda one: one[1].calls(now) / one[1].burst)
        return Left(
            scope,
            kind,
            bucket.per_s,
            bucket.burst,
            math.floor(bucket.calls(now)),
            bucket.wait_s(bucket.burst),
        )

    def _of(self, caller: Caller, kind: str, now: float) -> Iterator[tuple[str, Bucket]]:
        for scope, name, rates in (
            ("token", caller.token, self.per_token),
            ("user", caller.owner, self.per_user),
            ("namespace", caller.namespace, self.per_namespace),
        ):
            if not name or kind not in rates:
                continue
            key = (scope, name, kind)
            bucket = self._buckets.get(key)
            if bucket is None:
                bucket = self._buckets[key] = Bucket(rates[kind], now)
                if len(self._buckets) > _MAX_BUCKETS:
                    self._buckets.popitem(last=False)
            else:
                self._buckets.move_to_end(key)
            yield scope, bucket


_WHOSE = {
    "token": "this token",
    "user": "this user's tokens together",
    "namespace": "this namespace's tokens together",
}
_WHAT = {
    "reads": "calls that read",
    "changes": "calls that change something",
    "renewals": "heartbeats and releases",
}
