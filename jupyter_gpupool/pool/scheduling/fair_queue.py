"""The order in which queued requests are considered. Pure, like placement.

Within a namespace, requests are served first come, first served: a small request never overtakes an earlier large
one, so that large requests do not starve. Across namespaces, the one that holds the least relative to its weight goes
next, counted in whole GPUs, including its requests that are already ahead in this order. So a namespace gains nothing
by requesting more often. Namespaces do not block each other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from jupyter_gpupool.core.models import Lease, Request


def fair_order(
    queue: Sequence[Lease],
    held: Mapping[str, float],
    size: Callable[[Request], float],
    weights: Mapping[str, float] | None = None,
) -> list[Lease]:
    """The queued leases in the order in which they are to be granted.

    ``queue``: in order of arrival. ``held``: how many GPUs each namespace holds. ``size``: how many GPUs a request
    amounts to. ``weights``: positive, by namespace; default 1.
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
