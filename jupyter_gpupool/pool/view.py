"""The live part of a ledger, in memory: what every decision needs to know, without asking the database for it.

It is no second truth. It is read from the ledger, changed together with it, and read again whenever somebody else has
written (a counter in the database tells), or a transaction did not end as it should. :meth:`View.differs` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .models import Lease, LeaseState
from .placing import Granted


class View:
    """Live leases by id in order of arrival, and what is granted of each GPU. ``stamp`` is the database's counter."""

    def __init__(
        self, leases: Sequence[Lease], seqs: Mapping[str, int], granted: Mapping[str, int], newest: int
    ):
        self.leases: dict[str, Lease] = {lease.id: lease for lease in leases}
        self.seqs = dict(seqs)
        self.queued = dict.fromkeys(lease.id for lease in leases if lease.state is LeaseState.QUEUED)
        self.granted = Granted(granted)
        self.newest = newest
        self.stamp: Any = None
        self._undo: list[Callable[[], Any]] = []

    # -- changes, which can be taken back until the next begin()

    def begin(self) -> None:
        self._undo = []

    def put(self, lease: Lease) -> None:
        """A lease that lives, new or changed."""
        before = self.leases.get(lease.id)
        if before is None:
            self.newest += 1
            self.seqs[lease.id] = self.newest
        self.leases[lease.id] = lease
        if lease.state is LeaseState.QUEUED:
            self.queued[lease.id] = None
        else:
            self.queued.pop(lease.id, None)
        self._undo.append(lambda: self._restore(lease.id, before))

    def drop(self, lease_id: str) -> None:
        """One that has ended. Its place is forgotten; whoever takes that back has it at the end of its kind."""
        before, seq = self.leases.pop(lease_id), self.seqs.pop(lease_id)
        self.queued.pop(lease_id, None)

        def again() -> None:
            self.seqs[lease_id] = seq
            self._restore(lease_id, before)
            self._sort()

        self._undo.append(again)

    def use(self, uuid: str, more_mib: int) -> None:
        self.granted.use(uuid, more_mib)
        self._undo.append(lambda: self.granted.use(uuid, -more_mib))

    @property
    def mark(self) -> int:
        return len(self._undo)

    def undo(self, mark: int = 0) -> None:
        while len(self._undo) > mark:
            self._undo.pop()()

    # -- checking

    def differs(self, other: View) -> str:
        """Where it is not as another one, in one line; empty where it is."""
        if list(self.leases) != list(other.leases) or list(self.queued) != list(other.queued):
            return "other leases, or in another order"
        for lease_id, lease in self.leases.items():
            if (lease, self.seqs[lease_id]) != (other.leases[lease_id], other.seqs[lease_id]):
                return f"lease {lease_id} is {lease}, not {other.leases[lease_id]}"
        mine, others = ({k: v for k, v in view.granted.items() if v} for view in (self, other))
        return "" if mine == others else "other amounts are granted"

    def _restore(self, lease_id: str, before: Lease | None) -> None:
        if before is None:
            del self.leases[lease_id], self.seqs[lease_id]
            self.queued.pop(lease_id, None)
            return
        self.leases[lease_id] = before
        if before.state is LeaseState.QUEUED and lease_id not in self.queued:
            self.queued[lease_id] = None
            self._sort()
        elif before.state is not LeaseState.QUEUED:
            self.queued.pop(lease_id, None)

    def _sort(self) -> None:
        """Back into the order of arrival, after something was taken back."""
        self.leases = dict(sorted(self.leases.items(), key=lambda item: self.seqs[item[0]]))
        self.queued = dict.fromkeys(lease_id for lease_id in self.leases if lease_id in self.queued)
