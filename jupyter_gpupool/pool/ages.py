"""Who is alive, and who computes. In memory, measured on a clock that nobody sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .models import Lease, LeaseState

#: A worker that computed nothing for so long is told as idle, in seconds; or for half of what its namespace allows.
IDLE_AFTER_S = 30.0


@dataclass(frozen=True)
class Beat:
    """When something was last heard, on the clock that people read and on the one that measures."""

    wall: float
    monotonic: float


class Ages:
    """Since when each lease is silent, without a worker, or idle. A new one gives everybody the time from its start."""

    def __init__(
        self, clock: Callable[[], float], monotonic: Callable[[], float], attach_timeout_s: float
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._attach_timeout_s = attach_timeout_s
        self.restart()

    def restart(self) -> None:
        self._since = self._now()
        self._beats: dict[str, Beat] = {}
        self._granted: dict[str, float] = {}
        self._computed: dict[str, Beat] = {}

    def beat(self, lease_id: str) -> None:
        """Its holder is alive."""
        self._beats[lease_id] = self._now()

    def computed(self, lease_ids: Iterable[str]) -> None:
        """Their workers compute, or their holders say that they will again."""
        now = self._now()
        self._computed.update((lease_id, now) for lease_id in lease_ids)

    def changed(self, lease: Lease) -> None:
        """A lease has come to another state."""
        if lease.state.ended:
            for known in (self._beats, self._granted, self._computed):
                known.pop(lease.id, None)
        elif lease.state is LeaseState.GRANTED:
            self._granted[lease.id] = self._monotonic()
        elif lease.id not in self._computed:
            self._computed[lease.id] = self._now()

    def heard(self, lease: Lease) -> Beat:
        return self._beats.get(lease.id, self._since)

    def silent(self, lease: Lease) -> str | None:
        """Why the lease is over for want of a sign of life, if it is."""
        age = self._monotonic() - self.heard(lease).monotonic
        return f"no sign of life from its holder for {lease.ttl_s:g} s" if age > lease.ttl_s else None

    def beating(self, leases: Iterable[Lease]) -> Iterator[bool]:
        """Of each whether it is heard and needs no worker, as nearly all are: neither silent nor workerless."""
        now, beats, since = self._monotonic(), self._beats, self._since
        for lease in leases:
            heard = now - beats.get(lease.request.id, since).monotonic <= lease.ttl_s
            yield heard and lease.state is not LeaseState.GRANTED

    def workerless(self, lease: Lease) -> str | None:
        """Why a grant is over for want of a worker, if it is."""
        if lease.state is not LeaseState.GRANTED:
            return None
        age = self._monotonic() - self._granted.get(lease.id, self._since.monotonic)
        limit = self._attach_timeout_s
        return f"its worker did not come up within {limit:g} s" if age > limit else None

    def idle_s(self, lease: Lease) -> float:
        """For how long an ACTIVE lease has computed nothing, in seconds; 0 for others."""
        if lease.state is not LeaseState.ACTIVE:
            return 0.0
        return self._monotonic() - self._computed.get(lease.id, self._since).monotonic

    def idle_since(self, lease: Lease, limit_s: float | None) -> float | None:
        """Since when (seconds since the epoch), once that is worth telling."""
        least = IDLE_AFTER_S if limit_s is None else min(IDLE_AFTER_S, limit_s / 2)
        if self.idle_s(lease) < least:
            return None
        return round(self._computed.get(lease.id, self._since).wall)

    def _now(self) -> Beat:
        return Beat(self._clock(), self._monotonic())
