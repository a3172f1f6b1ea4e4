"""How long a lease lasts, and who would like to have it. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timezone

from .errors import ImpossibleRequest, InvalidRequest
from .models import AskedBack, Lease, Namespace
from .validation import check_text

#: How many people may ask for one lease; the newest count.
_MOST_ASKERS = 16
_LONGEST_S = 100 * 365 * 86400.0


def extended(lease: Lease, namespace: Namespace, now: float, seconds: float) -> Lease:
    """The lease with so many more seconds. Raises InvalidRequest, and ImpossibleRequest for more than there may be."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= _LONGEST_S:
        raise InvalidRequest("extend_s must be seconds above 0 and at most a hundred years")
    if lease.expires_at is None:
        raise InvalidRequest(f"lease {lease.id} has no end, so it needs no more time")
    until, longest = lease.expires_at + seconds, namespace.limits.lease_s
    if longest is not None and until > now + longest:
        more = math.floor(now + longest - lease.expires_at)
        can = f"ask for {span(more)} ({more} s) at most" if more >= 1 else "it has as much already"
        raise ImpossibleRequest(
            f"leases of the namespace {namespace.name!r} last {span(longest)} at most, counted from now: {can}"
        )
    return replace(lease, expires_at=until)


def asked_back(lease: Lease, by: str, now: float, message: str) -> Lease:
    """The lease with somebody's wish to have it; who asks again is heard once. Raises InvalidRequest."""
    check_text("message", message)
    if by == lease.request.owner:
        raise InvalidRequest(f"lease {lease.id} is your own; give it back with `gpupool release`")
    others = tuple(one for one in lease.asked_back if one.by != by)
    return replace(lease, asked_back=(*others, AskedBack(by, round(now, 1), message))[-_MOST_ASKERS:])


def why_expired(lease: Lease, namespace: Namespace) -> str:
    at = datetime.fromtimestamp(lease.expires_at or 0.0, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    longest = namespace.limits.lease_s
    last = f"; leases of the namespace {namespace.name!r} last {span(longest)} at most" if longest else ""
    return f"its time was over at {at}{last}"


def why_idle(namespace: Namespace) -> str:
    limit = namespace.limits.idle_s or 0.0
    return (
        f"it computed nothing for {span(limit)}, which is as long as the namespace {namespace.name!r} allows"
    )


def span(seconds: float) -> str:
    """``9000`` → ``"2 h 30 min"``: at most two units."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
