"""The live leases of a ledger, in memory, so that a decision needs no query.

The database stays the only source of truth. The live leases are read from it and changed together with it. They are
read again when another process has written (a counter in the database shows it) or a transaction has failed.
:meth:`LiveLeases.difference_from` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.pool.scheduling.placement_index import Granted
from jupyter_gpupool.pool.scheduling.reservation import Share


class LiveLeases:
    """Live leases by id in order of arrival, and the MiB granted of each GPU. ``stamp``: the database's counter."""

    def __init__(
        self, leases: Sequence[Lease], seqs: Mapping[str, int], granted: Mapping[str, int], newest: int
    ) -> None:
        self.leases: dict[str, Lease] = {lease.id: lease for lease in leases}
        self.seqs = dict(seqs)
        self.queued = dict.fromkeys(lease.id for lease in leases if lease.state is LeaseState.QUEUED)
        self.woken = dict.fromkeys(lease.id for lease in leases if lease.is_woken)
        self.granted = Granted(granted)
        self._on: dict[str, dict[str, Share]] = {}
        for lease in leases:
            self._occupy(lease)
        self.newest = newest
        self.stamp: Any = None
        self._undo: list[Callable[[], Any]] = []

    # -- changes, which can be undone until the next begin()

    def begin(self) -> None:
        """Forget the earlier changes, which can then not be undone any more."""
        self._undo = []

    def put(self, lease: Lease) -> None:
        """Add or replace a live lease."""
        before = self.leases.get(lease.id)
        self._vacate(before)
        self._occupy(lease)
        if before is None:
            self.newest += 1
            self.seqs[lease.id] = self.newest
        self.leases[lease.id] = lease
        if lease.state is LeaseState.QUEUED:
            self.queued[lease.id] = None
        else:
            self.queued.pop(lease.id, None)
        self._set_woken(lease)
        self._undo.append(lambda: self._restore(lease.id, before))

    def drop(self, lease_id: str) -> None:
        """Remove a lease that has ended."""
        before, seq = self.leases.pop(lease_id), self.seqs.pop(lease_id)
        self.queued.pop(lease_id, None)
        self.woken.pop(lease_id, None)
        self._vacate(before)

        def restore() -> None:
            self.seqs[lease_id] = seq
            self._restore(lease_id, before)
            self._sort()

        self._undo.append(restore)

    def use(self, uuid: str, more_mib: int) -> None:
        """Add MiB to what is granted of a GPU; negative to free some."""
        self.granted.use(uuid, more_mib)
        self._undo.append(lambda: self.granted.use(uuid, -more_mib))

    @property
    def mark(self) -> int:
        """How many changes there were since ``begin``."""
        return len(self._undo)

    def undo(self, mark: int = 0) -> None:
        """Undo all changes since ``mark``."""
        while len(self._undo) > mark:
            self._undo.pop()()

    # -- checking

    def difference_from(self, other: LiveLeases) -> str:
        """The first difference from another one, in one line; empty if there is none."""
        if (
            list(self.leases) != list(other.leases)
            or list(self.queued) != list(other.queued)
            or self.woken.keys() != other.woken.keys()
        ):
            return "other leases, or in another order"
        for lease_id, lease in self.leases.items():
            if (lease, self.seqs[lease_id]) != (other.leases[lease_id], other.seqs[lease_id]):
                return f"lease {lease_id} is {lease}, not {other.leases[lease_id]}"
        mine, others = ({k: v for k, v in live.granted.items() if v} for live in (self, other))
        return "" if mine == others else "other amounts are granted"

    # -- who is on a GPU

    def on(self, uuid: str) -> Mapping[str, Share]:
        """What each lease holds of a GPU, by lease id."""
        return self._on.get(uuid, {})

    def _occupy(self, lease: Lease | None) -> None:
        if lease is not None:
            for piece in lease.held:
                share = Share(piece.memory_mib, len(lease.slices))
                self._on.setdefault(piece.gpu_uuid, {})[lease.id] = share

    def _vacate(self, lease: Lease | None) -> None:
        if lease is not None:
            for piece in lease.held:
                self._on[piece.gpu_uuid].pop(lease.id, None)

    def _restore(self, lease_id: str, before: Lease | None) -> None:
        self._vacate(self.leases.get(lease_id))
        self._occupy(before)
        if before is None:
            del self.leases[lease_id], self.seqs[lease_id]
            self.queued.pop(lease_id, None)
            return
        self.leases[lease_id] = before
        self._set_woken(before)
        if before.state is LeaseState.QUEUED and lease_id not in self.queued:
            self.queued[lease_id] = None
            self._sort()
        elif before.state is not LeaseState.QUEUED:
            self.queued.pop(lease_id, None)

    def _set_woken(self, lease: Lease) -> None:
        if lease.is_woken:
            self.woken[lease.id] = None
        else:
            self.woken.pop(lease.id, None)

    def _sort(self) -> None:
        """Restore the order of arrival after an undo."""
        self.leases = dict(sorted(self.leases.items(), key=lambda item: self.seqs[item[0]]))
        self.queued = dict.fromkeys(lease_id for lease_id in self.leases if lease_id in self.queued)
