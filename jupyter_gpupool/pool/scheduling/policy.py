"""Which GPUs a request gets among those that have room: the order of GPUs, of servers, and across servers.

A placement policy is pure and stateless. :mod:`.placement` and :mod:`.placement_index` both choose by it, so they
always agree. Add a policy by adding an instance to :data:`POLICIES`; the tests compare both searches for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jupyter_gpupool.core.models import GPU

#: The GPUs of one server that have room for a request, in the policy's order, each with the MiB that would be left.
Room = list[tuple[int, GPU]]


class PlacementPolicy(Protocol):
    """How to choose among the GPUs that have room. All keys are compared with ``<``; the lowest goes first."""

    @property
    def name(self) -> str:
        """One word, for configuration."""

    def gpu_key(self, left_mib: int, gpu: GPU) -> Any:
        """The order of one server's GPUs. ``left_mib``: what would be left of it. The GPU's index breaks ties."""

    def server_key(self, left_mib: Sequence[int], demand: int, whole_left: int) -> Any:
        """The order of servers that can each serve the whole request. ``left_mib``: what would be left of each of its
        chosen GPUs; ``demand``: how many ask for their models by name, as a rank; ``whole_left``: how many idle GPUs
        the server would have left. The order of the servers breaks ties."""

    def choose_across(self, rooms: Sequence[Room], count: int) -> list[GPU] | None:
        """``count`` GPUs for a request that may use several servers; None if fewer have room."""


class FewServers:
    """Best fit: use the GPUs that are left with the least memory, so that large requests find large gaps for longer.
    Of equals, the model that fewest ask for by name; then the server that is left with the fewest idle GPUs, so that
    others stay whole.

    A request that may use several servers gets as few as possible: those with room on the most GPUs, and for the
    rest the server that fits best.
    """

    name = "few_servers"

    def gpu_key(self, left_mib: int, gpu: GPU) -> int:
        return left_mib

    def server_key(self, left_mib: Sequence[int], demand: int, whole_left: int) -> tuple[int, int, int]:
        return sum(left_mib), demand, whole_left

    def choose_across(self, rooms: Sequence[Room], count: int) -> list[GPU] | None:
        def left(n: int, most: int) -> int:
            return sum(rest for rest, _ in rooms[n][:most])

        chosen: list[GPU] = []
        order = sorted(range(len(rooms)), key=lambda n: (-len(rooms[n]), left(n, count), n))
        for place, n in enumerate(order):
            if not rooms[n]:
                break
            if len(rooms[n]) < count - len(chosen):
                chosen += [gpu for _, gpu in rooms[n]]
                continue
            rest = count - len(chosen)
            last = min((m for m in order[place:] if len(rooms[m]) >= rest), key=lambda m: (left(m, rest), m))
            return chosen + [gpu for _, gpu in rooms[last][:rest]]
        return None


class Spread:
    """Use the GPUs that are left with the most memory, so that leases disturb each other least.
    Of equals, the model that fewest ask for by name; then the server that is left with the most idle GPUs.

    A request that may use several servers gets as many as possible: the best GPU of each, then the second best.
    """

    name = "spread"

    def gpu_key(self, left_mib: int, gpu: GPU) -> int:
        return -left_mib

    def server_key(self, left_mib: Sequence[int], demand: int, whole_left: int) -> tuple[int, int, int]:
        return -sum(left_mib), demand, -whole_left

    def choose_across(self, rooms: Sequence[Room], count: int) -> list[GPU] | None:
        candidates = [
            (rank, -left_mib, n, gpu)
            for n, room in enumerate(rooms)
            for rank, (left_mib, gpu) in enumerate(room)
        ]
        if len(candidates) < count:
            return None
        candidates.sort(key=lambda candidate: candidate[:3])
        return [gpu for *_, gpu in candidates[:count]]


FEW_SERVERS: PlacementPolicy = FewServers()
SPREAD: PlacementPolicy = Spread()

#: Every policy, by name. The first is the default.
POLICIES: dict[str, PlacementPolicy] = {policy.name: policy for policy in (FEW_SERVERS, SPREAD)}
