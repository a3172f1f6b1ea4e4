"""In what order waiting requests are looked at. Pure, like placement.

Within one namespace strictly first come, first served: a small request never overtakes a large one
that came earlier, so the large one cannot starve. Between namespaces the one that holds least for its
weight goes first (counted in whole GPUs, what is ahead in this very order included), so nobody gets more
by asking more often. A namespace whose first request does not fit now does not hold up the others.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from .models import Lease, Request


def fair_order(
    queue: Sequence[Lease],
    held: Mapping[str, float],
    size: Callable[[Request], float],
    weights: Mapping[str, float] | None = None,
) -> list[Lease]:
    """The queued leases in the order in which they are to be granted.

    ``queue`` is in order of arrival, ``held`` says how many GPUs each namespace holds, and ``size``
    how many a request amounts to. ``weights`` are positive; who is not named there has 1.
    """
    waiting: dict[str, deque[tuple[int, Lease]]] = defaultdict(deque)
    for arrival, lease in enumerate(queue):
        waiting[lease.request.namespace].append((arrival, lease))
    weight = {name: (weights or {}).get(name, 1.0) for name in waiting}
    share = {name: held.get(name, 0.0) / weight[name] for name in waiting}
    order: list[Lease] = []
    while waiting:
        # Rounded, so that 0.1 + 0.2 and 0.3 count as the same share and arrival decides.
        name = min(waiting, key=lambda name: (round(share[name], 6), waiting[name][0][0]))
        lease = waiting[name].popleft()[1]
        share[name] += size(lease.request) / weight[name]
        order.append(lease)
        if not waiting[name]:
            del waiting[name]
    return order
