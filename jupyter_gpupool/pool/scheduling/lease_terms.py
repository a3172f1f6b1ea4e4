"""How long a lease lasts, and who has asked its holder to release it. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from jupyter_gpupool.core.durations import format_duration, format_time
from jupyter_gpupool.core.errors import ImpossibleRequest, InvalidRequest
from jupyter_gpupool.core.models import AskedBack, Lease, Namespace
from jupyter_gpupool.core.validation import check_text

#: How many users' requests to release one lease are kept, the newest.
_MAX_ASKERS = 16
_MAX_EXTENSION_S = 100 * 365 * 86400.0


def extended(lease: Lease, namespace: Namespace, now: float, seconds: float) -> Lease:
    """The lease with more seconds. Raises InvalidRequest, and ImpossibleRequest beyond its namespace's limit."""
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, (int, float))
        or not 0 < seconds <= _MAX_EXTENSION_S
    ):
        raise InvalidRequest("extend_s must be seconds above 0 and at most a hundred years")
    if lease.expires_at is None:
        raise InvalidRequest(f"lease {lease.id} does not expire, so it cannot be extended")
    until, longest = lease.expires_at + seconds, namespace.limits.lease_s
    if longest is not None and until > now + longest:
        more = math.floor(now + longest - lease.expires_at)
        can = f"ask for {format_duration(more)} ({more} s) at most" if more >= 1 else "it has as much already"
        raise ImpossibleRequest(
            f"leases of the namespace {namespace.name!r} last {format_duration(longest)} at most, counted from now: "
            f"{can}"
        )
    return replace(lease, expires_at=until)


def asked_back(lease: Lease, by: str, now: float, message: str) -> Lease:
    """The lease with one more request to release it, which replaces the user's earlier one. Raises InvalidRequest."""
    check_text("message", message)
    if by == lease.request.owner:
        raise InvalidRequest(f"lease {lease.id} is your own; release it with `gpupool release`")
    others = tuple(one for one in lease.asked_back if one.by != by)
    return replace(lease, asked_back=(*others, AskedBack(by, round(now, 1), message))[-_MAX_ASKERS:])


def why_expired(lease: Lease, namespace: Namespace) -> str:
    """The reason of a lease whose time was over."""
    at = format_time(lease.expires_at or 0.0)
    longest = namespace.limits.lease_s
    last = (
        f"; leases of the namespace {namespace.name!r} last {format_duration(longest)} at most"
        if longest
        else ""
    )
    return f"its time was over at {at}{last}"


def why_idle(namespace: Namespace) -> str:
    """The reason of a lease that was idle for too long."""
    limit = format_duration(namespace.limits.idle_s or 0.0)
    return f"it computed nothing for {limit}, which is as long as the namespace {namespace.name!r} allows"
