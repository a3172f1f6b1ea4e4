"""Which holders are alive, and which workers compute. Kept in memory, measured on a monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jupyter_gpupool.core.models import Lease, LeaseState

#: A worker that has computed nothing for so long is shown as idle, in seconds; or for half of its namespace's limit.
IDLE_AFTER_S = 30.0


@dataclass(frozen=True)
class Beat:
    """The time of a sign of life: ``wall`` in seconds since the epoch, ``monotonic`` for measuring ages."""

    wall: float
    monotonic: float


class Liveness:
    """Since when each lease is silent, without a worker, or idle. A new instance counts from its own start."""

    def __init__(
        self,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        attach_timeout_s: float,
        resume_s: float = 0.0,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._attach_timeout_s = attach_timeout_s
        self._resume_s = resume_s
        self.restart()

    def restart(self) -> None:
        """Count from now for every lease."""
        self._since = self._now()
        self._beats: dict[str, Beat] = {}
        self._granted: dict[str, float] = {}
        self._computed: dict[str, Beat] = {}
        self._resident: dict[str, float] = {}

    def beat(self, lease_id: str) -> None:
        """Record that the lease's holder is alive."""
        self._beats[lease_id] = self._now()

    def computed(self, lease_ids: Iterable[str]) -> None:
        """Record that the leases' workers compute, or that their holders keep them."""
        now = self._now()
        self._computed.update((lease_id, now) for lease_id in lease_ids)

    def changed(self, lease: Lease) -> None:
        """Follow a lease into another state."""
        if lease.state.ended:
            for known in (self._beats, self._granted, self._computed, self._resident):
                known.pop(lease.id, None)
        elif lease.state is LeaseState.GRANTED:
            self._granted[lease.id] = self._monotonic()
        elif lease.state is LeaseState.PARKED:
            self._resident.pop(lease.id, None)
        elif lease.id not in self._resident and lease.state is LeaseState.ACTIVE:
            self._resident[lease.id] = self._monotonic()
            self._computed[lease.id] = self._now()
        elif lease.id not in self._computed:
            self._computed[lease.id] = self._now()

    def heard(self, lease: Lease) -> Beat:
        """The last heartbeat of the lease's holder."""
        return self._beats.get(lease.id, self._since)

    def silent(self, lease: Lease) -> str | None:
        """Why the lease ends because its holder is silent; None if the holder is not."""
        age = self._monotonic() - self.heard(lease).monotonic
        limit = self._limit_s(lease)
        return f"no sign of life from its holder for {limit:g} s" if age > limit else None

    def _limit_s(self, lease: Lease) -> float:
        """How long the lease lives without a heartbeat."""
        is_up = lease.state in (LeaseState.ACTIVE, LeaseState.PARKED)
        return max(lease.ttl_s, self._resume_s) if is_up else lease.ttl_s

    def beating(self, leases: Iterable[Lease]) -> Iterator[bool]:
        """For each lease, whether it is neither silent nor workerless, as nearly all are."""
        now, beats, since = self._monotonic(), self._beats, self._since
        for lease in leases:
            heard = now - beats.get(lease.request.id, since).monotonic <= self._limit_s(lease)
            yield heard and lease.state is not LeaseState.GRANTED

    def workerless(self, lease: Lease) -> str | None:
        """Why the lease ends because its worker did not come up; None if it goes on."""
        if lease.state is not LeaseState.GRANTED:
            return None
        age = self._monotonic() - self._granted.get(lease.id, self._since.monotonic)
        limit = self._attach_timeout_s
        return f"its worker did not come up within {limit:g} s" if age > limit else None

    def idle_s(self, lease: Lease) -> float:
        """For how long an ACTIVE or PARKED lease has computed nothing, in seconds; 0 for others, and for one that would
        compute if it had its GPUs."""
        if lease.state not in (LeaseState.ACTIVE, LeaseState.PARKED) or lease.is_woken or lease.moving_to:
            return 0.0
        return self._monotonic() - self._computed.get(lease.id, self._since).monotonic

    def idle_since(self, lease: Lease, limit_s: float | None) -> float | None:
        """Since when the lease is idle, in seconds since the epoch; None if it is not, or only for a moment."""
        min_idle_s = IDLE_AFTER_S if limit_s is None else min(IDLE_AFTER_S, limit_s / 2)
        if self.idle_s(lease) < min_idle_s:
            return None
        return round(self._computed.get(lease.id, self._since).wall)

    def resident_s(self, lease: Lease) -> float:
        """For how long an ACTIVE lease has had its GPUs, as far as is known, in seconds."""
        return self._monotonic() - self._resident.get(lease.id, self._since.monotonic)

    def _now(self) -> Beat:
        return Beat(self._clock(), self._monotonic())
