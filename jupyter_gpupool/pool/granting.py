"""Which of those who wait are granted now. Pure: the queue and what is held in, decisions out.

Within a namespace nobody overtakes a request that waits for memory or for its namespace's limit. One that waits
for its own user's share holds up that user's later requests only. What no server present could grant (one may
be away, or a limit was lowered) keeps its place, but nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from . import limits
from .limits import Held, Holding
from .models import Lease, Namespace, Server, Slice
from .placing import Granted, on_trial


@dataclass
class Decision:
    """What is granted, in that order; who goes on waiting, in order; and for which limits, by lease id."""

    granted: list[tuple[Lease, tuple[Slice, ...]]] = field(default_factory=list)
    waiting: list[Lease] = field(default_factory=list)
    waits_for: dict[str, str] = field(default_factory=dict)


def decide(
    queue: Sequence[Lease],
    servers: Sequence[Server],
    used: Mapping[str, int],
    held: Held,
    namespace: Callable[[str], Namespace],
    gone: Callable[[Lease], bool],
) -> Decision:
    """Grant what fits of a queue in fair order. ``used``: MiB granted by GPU uuid. ``gone``: whose request does not
    count any more."""
    with on_trial(used) as room:
        return _decide(queue, servers, room, dict(held), namespace, gone)


def _decide(
    queue: Sequence[Lease],
    servers: Sequence[Server],
    room: Granted,
    holding: dict[tuple[str, str], Holding],
    namespace: Callable[[str], Namespace],
    gone: Callable[[Lease], bool],
) -> Decision:
    decision = Decision()
    stuck: dict[tuple[str, str | None], str] = {}  # and for which limit
    for lease in queue:
        name, owner = lease.request.namespace, lease.request.owner
        slices, limit = None, ""
        before_it = [stuck[key] for key in ((name, None), (name, owner)) if key in stuck]
        if not gone(lease) and (not before_it or any(before_it)):
            of = namespace(name)
            within = limits.bounds(of, owner, holding)
            slices, limit, users = limits.place(lease.request, servers, room, within)
            if before_it:
                slices = None  # it is not its turn, and only asked what it waits for
            elif slices is None and not limits.impossible(lease.request, servers, of, owner):
                stuck[name, owner if users else None] = limit
        if slices is None:
            decision.waiting.append(lease)
            if limit:
                decision.waits_for[lease.id] = limit
            continue
        decision.granted.append((lease, slices))
        for piece in slices:
            room.try_out(piece.gpu_uuid, piece.memory_mib)
        before = holding.get((name, owner), Holding())
        holding[name, owner] = before + limits.of_slices(slices)
    return decision
