"""What the Events on a Pod say about its lease. Pure functions."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core.lease_words import gpus_of, memory_of
from jupyter_gpupool.core.models import Lease, LeaseState

#: An Event older than this, in seconds, is not written any more: the API server forgets them after an hour.
RECENT_S = 3000.0
_COMPONENT = "gpupool-controller"
#: How a lease ends → what the Event is called.
_ENDS = {
    LeaseState.RELEASED: "Released",
    LeaseState.EXPIRED: "Expired",
    LeaseState.LOST: "Lost",
    LeaseState.CANCELLED: "Cancelled",
}


@dataclass(frozen=True)
class PodEvent:
    """An Event on a Pod. Told twice, it is the same object. ``at``: seconds since the epoch."""

    name: str
    namespace: str
    pod: str
    uid: str
    reason: str
    message: str
    at: float
    is_warning: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the object of the API server."""
        at = datetime.datetime.fromtimestamp(self.at, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        about = {"namespace": self.namespace, "name": self.pod, "uid": self.uid}
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", **about},
            "reason": self.reason,
            "message": self.message,
            "type": "Warning" if self.is_warning else "Normal",
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
            "source": {"component": _COMPONENT},
        }


def events_of(lease: Lease, before: Lease | None, pod: Mapping[str, Any], now: float) -> list[PodEvent]:
    """Return what the Pod is to be told of its lease, as it is now and as it was seen before (None: never)."""
    metadata = pod["metadata"]
    name, about = (
        str(metadata["name"]),
        (str(metadata["namespace"]), str(metadata["name"]), str(metadata["uid"])),
    )
    return [
        PodEvent(f"{name[:180]}.{lease.id}.{mark}", *about, reason, message[:1000], at, is_warning)
        for mark, reason, message, at, is_warning in _told(lease, before, now)
        if now - at < RECENT_S
    ]


def _told(lease: Lease, before: Lease | None, now: float) -> Iterator[tuple[str, str, str, float, bool]]:
    """Yield mark, reason, message, time, and whether it is a warning. One of a mark replaces the one before it."""
    if lease.state is LeaseState.QUEUED:
        why = f": {lease.waits_for}" if lease.waits_for else ""
        yield "queued", "Queued", f"Queued at place {lease.position}{why}", lease.created_at, False
    if lease.granted_at is not None and lease.slices:
        yield "granted", "Granted", _granted(lease), lease.granted_at, False
    if lease.parked is not None:
        since = lease.parked.since
        yield f"parked-{since:.0f}", "Parked", "Parked while it was idle, for others waited", since, False
        if lease.is_woken and lease.parked.wanted_since is not None:
            wanted = lease.parked.wanted_since
            yield f"waking-{wanted:.0f}", "Waking", f"Waits for GPUs at place {lease.position}", wanted, False
    if before is not None and lease.state.holds:
        if before.state is LeaseState.PARKED:
            yield f"resumed-{now:.0f}", "Resumed", f"Has GPUs again: {gpus_of(lease)}", now, False
        elif before.state.holds and _servers(before) != _servers(lease):
            message = f"Moved from {', '.join(_servers(before))} to {gpus_of(lease)}"
            yield f"moved-{now:.0f}", "Moved", message, now, False
    if lease.state.ended:
        message = lease.reason or f"The lease is {lease.state.value}"
        is_warning = lease.state is not LeaseState.RELEASED
        yield "ended", _ENDS[lease.state], message, lease.ended_at or now, is_warning


def _granted(lease: Lease) -> str:
    return f"Granted GPUs {gpus_of(lease)} with {memory_of(lease)} MiB each"


def _servers(lease: Lease) -> list[str]:
    return list(dict.fromkeys(piece.server for piece in lease.slices))
