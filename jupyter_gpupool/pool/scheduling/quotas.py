"""How much the leases of a namespace, and of one user in it, may hold together. Pure, like placement.

A limit is checked against the slices that the request would get: the same fraction is more memory on a larger GPU,
and the same memory is a larger fraction of a smaller GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jupyter_gpupool.core.errors import TooManyRequests
from jupyter_gpupool.core.models import GPU, Lease, Limits, Namespace, Request, Server, Slice

from . import placement
from .placement_index import PlacementIndex

#: After how many seconds a request that found the queue full is worth another try.
_RETRY_S = 5.0
#: Sums of shares are compared with this tolerance: ten times 0.1 is 1.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Holding:
    """What some leases hold together: MiB, the whole GPUs that it amounts to, and the number of leases."""

    memory_mib: int = 0
    gpus: float = 0.0
    leases: int = 0

    def __add__(self, other: Holding) -> Holding:
        return Holding(self.memory_mib + other.memory_mib, self.gpus + other.gpus, self.leases + other.leases)


#: What is held now, by (namespace, owner).
Held = Mapping[tuple[str, str], Holding]


@dataclass(frozen=True)
class QueueLimits:
    """How many requests of one user, and of one namespace, may wait at once; 0 is no limit."""

    per_user: int = 0
    per_namespace: int = 0


def check_queue(request: Request, queue: Iterable[Lease], limits: QueueLimits) -> None:
    """Raise TooManyRequests where as many requests wait as may."""
    mine = theirs = 0
    for lease in queue:
        mine += lease.request.owner == request.owner
        theirs += lease.request.namespace == request.namespace
    for who, count, most in (
        ("this user", mine, limits.per_user),
        (f"the namespace {request.namespace!r}", theirs, limits.per_namespace),
    ):
        if most and count >= most:
            raise TooManyRequests(
                f"{who} has {count} requests in the queue, and may have {most}; withdraw some, or wait until some are "
                f"granted",
                _RETRY_S,
            )


def of_slices(slices: Iterable[Slice], leases: int = 1) -> Holding:
    """What these slices amount to."""
    pieces = list(slices)
    return Holding(
        sum(piece.memory_mib for piece in pieces),
        sum(piece.memory_mib / piece.total_mib for piece in pieces),
        leases,
    )


def of_namespace(held: Held, name: str) -> Holding:
    """What all leases of a namespace hold together."""
    return sum((holding for (of, _), holding in held.items() if of == name), Holding())


@dataclass(frozen=True)
class Bound:
    """One limit on a sum: who it is for (``users``: one user's share), how much, and what is held now."""

    who: str
    users: bool
    memory_mib: float
    gpus: float
    leases: float
    held: Holding = Holding()

    def objection(self, more: Holding) -> str | None:
        """The limit that forbids so much more, as one line; None if none does."""
        for have, want, most, unit in (
            (self.held.leases, more.leases, self.leases, "leases"),
            (self.held.gpus, more.gpus, self.gpus, "GPUs"),
            (self.held.memory_mib, more.memory_mib, self.memory_mib, "MiB"),
        ):
            if want > 0 and have + want > most + _ROUNDING:
                has = f", holds {_shown(have)}" if have else ""
                return f"{self.who} may hold {_shown(most)} {unit}{has}, and this is {_shown(want)} more"
        return None

    def idle(self) -> Bound:
        """The same limit with nothing held."""
        return replace(self, held=Holding())


def bounds(namespace: Namespace, owner: str, held: Held) -> list[Bound]:
    """The limits for a lease of that owner: the namespace's, then one user's share of them."""
    limits = namespace.limits
    if limits.memory_mib is None and limits.gpus is None and limits.leases is None:
        return []
    who = f"the namespace {namespace.name!r}"
    found = [_bound(who, False, limits, of_namespace(held, namespace.name))]
    share = limits.user_share
    if share is not None:
        own = Limits(
            None if limits.memory_mib is None else math.floor(limits.memory_mib * share + _ROUNDING),
            None if limits.gpus is None else limits.gpus * share,
            # Every user of a namespace may have one lease there.
            None
            if limits.leases is None
            else min(limits.leases, max(1, math.floor(limits.leases * share + _ROUNDING))),
        )
        mine = held.get((namespace.name, owner), Holding())
        found.append(_bound(f"one user of {who}", True, own, mine))
    return found


def place(
    request: Request, index: PlacementIndex, used: Mapping[str, int], within: Sequence[Bound]
) -> tuple[tuple[Slice, ...] | None, str, bool]:
    """The slices for a request; or None with the limit that blocks it, and whether that is one user's share.

    The limit is empty if the request waits for free memory.
    """
    slices = index.place(request, used)
    objection = first_objection(within, slices) if slices else None
    if objection is None:
        return slices, "", False
    # GPUs other than the best may be within the limits.
    slices = placement.place(
        request, within_limits(request, index.servers, within), used, index.policy, index.demand
    )
    if slices is not None and first_objection(within, slices) is None:
        return slices, "", False
    return None, *objection


def impossible(request: Request, index: PlacementIndex, namespace: Namespace, owner: str = "") -> str | None:
    """Why these servers could not grant the request even if they were idle; None if they could."""
    reason = index.impossible(request)
    if reason:
        return f"this pool can never grant the request: {reason}"
    alone = bounds(namespace, owner, {})
    if alone:
        idle = [
            replace(server, gpus=tuple(replace(gpu, taken_mib=0) for gpu in server.gpus))
            for server in index.servers
        ]
        objection = place(request, PlacementIndex(idle, index.policy, index.demand), {}, alone)[1]
        if objection:
            return f"the request can never be granted: {objection}"
    return None


def objection_to(
    before: Sequence[Slice], after: Sequence[Slice], within: Sequence[Bound]
) -> tuple[str, bool] | None:
    """The limit that forbids other slices for a lease, and whether it forbids them for ever; None if none does."""
    old, new = of_slices(before), of_slices(after)
    more = Holding(max(0, new.memory_mib - old.memory_mib), max(0.0, new.gpus - old.gpus))
    for bound in within:
        never = bound.idle().objection(replace(new, leases=0)) if more.memory_mib else None
        if never:
            return never, True
        now = bound.objection(more)
        if now:
            return now, False
    return None


def lowest(one: Limits, other: Limits) -> Limits:
    """The stricter of both, limit by limit."""

    def least(name: str) -> float | None:
        given = [value for value in (getattr(one, name), getattr(other, name)) if value is not None]
        return min(given) if given else None

    return Limits(**{name: least(name) for name in Limits.__dataclass_fields__})  # type: ignore[arg-type]


def _bound(who: str, users: bool, limits: Limits, held: Holding) -> Bound:
    def most(value: float | None) -> float:
        return math.inf if value is None else value

    return Bound(who, users, most(limits.memory_mib), most(limits.gpus), most(limits.leases), held)


def first_objection(within: Sequence[Bound], slices: Sequence[Slice]) -> tuple[str, bool] | None:
    """The first limit that forbids so much more, and whether it is one user's share; None if none does."""
    more = of_slices(slices)
    for bound in within:
        objection = bound.objection(more)
        if objection:
            return objection, bound.users
    return None


def within_limits(request: Request, servers: Sequence[Server], within: Sequence[Bound]) -> list[Server]:
    """The servers with only those GPUs of which the requested number of slices is within the limits."""

    def fits(gpu: GPU) -> bool:
        share = placement.share_mib(request, gpu)
        more = Holding(share * request.num_gpus, share / gpu.memory_mib * request.num_gpus, 1)
        return all(bound.objection(more) is None for bound in within)

    return [replace(server, gpus=tuple(gpu for gpu in server.gpus if fits(gpu))) for server in servers]


def _shown(amount: float) -> str:
    return f"{round(amount, 2):g}" if amount < 1000 else f"{amount:.0f}"
