"""Leases as they are shown: with heartbeats, queue positions and idle times, to those who may see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jupyter_gpupool.core.errors import LeaseEnded, UnknownLease
from jupyter_gpupool.core.models import Lease, LeaseState

from .ledger.ledger import Transaction
from .liveness import Liveness
from .pending_change import PendingChange
from .tenancy.namespaces import Namespaces

#: How many shown leases may be kept beyond the live ones.
_MAX_STALE_SHOWN = 1000


class LeaseView:
    """Finds leases for an owner, and completes them with what is known besides the ledger.

    ``keeps_shown``: whether an unchanged lease is shown as the very same object. A manager that follows another one
    reads every lease from the database, so that it never meets the same object twice.
    """

    def __init__(self, namespaces: Namespaces, liveness: Liveness) -> None:
        self._namespaces = namespaces
        self._liveness = liveness
        self._waits_for: Mapping[str, str] = {}
        self._shown: dict[str, tuple[Lease, Lease]] = {}  # the ledger's lease, and how it was shown last
        self.keeps_shown = True

    # -- finding

    def owned(self, tx: Transaction, lease_id: str, owner: str | None) -> Lease:
        """A lease of ``owner``; None is the pool's administrator. Raises UnknownLease."""
        lease = tx.lease(lease_id)
        if lease is None or owner not in (None, lease.request.owner):
            raise unknown(lease_id)
        return lease

    def managed(self, tx: Transaction, lease_id: str, owner: str | None) -> Lease:
        """A lease of ``owner``, or of a namespace that they administer. Raises UnknownLease."""
        lease = tx.lease(lease_id)
        if lease is None or not self._namespaces.manages(owner, lease):
            raise unknown(lease_id)
        return lease

    def visible(self, tx: Transaction, lease_id: str, owner: str | None) -> Lease:
        """A lease whose holder ``owner`` may see. Raises UnknownLease."""
        lease = tx.lease(lease_id)
        if lease is None or not self._namespaces.sees_holder(owner, lease):
            raise unknown(lease_id)
        return lease

    # -- showing

    def shown(
        self, lease: Lease, positions: Mapping[str, int], waits_for: Mapping[str, str] | None = None
    ) -> Lease:
        """The lease with its last heartbeat; one that waits with its position and the limit that blocks it; others
        with the time since which they are idle. ``waits_for`` None: the limits of the last change."""
        if lease.state.ended:
            return lease
        heard = max(lease.created_at, self._liveness.heard(lease).wall)
        if lease.state is LeaseState.QUEUED or lease.is_woken:
            limit = (self._waits_for if waits_for is None else waits_for).get(lease.id, "")
            return replace(lease, heartbeat_at=heard, position=positions.get(lease.id), waits_for=limit)
        idle_s = self._namespaces.of_lease(lease.request.namespace).limits.idle_s
        idle_since = self._liveness.idle_since(lease, idle_s)
        known, shown = self._shown.get(lease.id, (None, lease))
        if known is lease and (shown.heartbeat_at, shown.idle_since) == (heard, idle_since):
            return shown  # the same object, so that comparing thousands of leases is fast
        shown = replace(lease, heartbeat_at=heard, idle_since=idle_since)
        if self.keeps_shown:
            self._shown[lease.id] = (lease, shown)
        return shown

    def update(self, change: PendingChange) -> None:
        """Follow a change, after its commit."""
        if change.waits_for is not None:
            self._waits_for = change.waits_for
        for lease_id in change.changed:
            self._shown.pop(lease_id, None)

    def forget_stale(self, live: int) -> None:
        """Forget what was shown, once there is much more of it than live leases: another process has ended those."""
        if len(self._shown) > live + _MAX_STALE_SHOWN:
            self._shown.clear()


def living(lease: Lease) -> Lease:
    """The lease itself. Raises LeaseEnded."""
    if lease.state.ended:
        raise LeaseEnded(f"lease {lease.id} has ended ({lease.state.value}): {lease.reason}")
    return lease


def unknown(lease_id: object) -> UnknownLease:
    """The error for a lease that does not exist or that the caller may not see."""
    return UnknownLease(f"there is no lease {str(lease_id)[:60]!r}, or it is not yours")
