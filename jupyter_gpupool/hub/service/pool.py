"""The hub's pool: one for all users. A server's leases stay within what was chosen for the server."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from jupyter_gpupool.core.errors import ImpossibleRequest, InvalidRequest, NoCapacity, PermissionDenied
from jupyter_gpupool.core.models import Lease, Request, Role
from jupyter_gpupool.hub.options import GPUOptions
from jupyter_gpupool.server.service.service import PoolService

from .identity import MARK

#: Who grants the roles that follow from groups, as the ledger names it.
HUB = "jupyterhub"


@dataclass(frozen=True)
class Ceiling:
    """The limit for all leases of one server. ``lent`` is the id of the lease of its start, if it has one."""

    choice: GPUOptions
    lent: str = ""


class HubPool(PoolService):
    """A pool whose requests come from servers, each named by its mark; see :func:`.identity.marked`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: The limits, by server's mark.
        self.ceilings: dict[str, Ceiling] = {}
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def belongs(self, user: str, namespace: str) -> None:
        """Make a user a member of the namespace of their group at the hub, and of no other group's."""
        await self.tenants.set_issued_roles(user, HUB, {namespace: Role.USE})

    async def lend(self, request: Request) -> Lease:
        """Request the lease of a server's start, which the hub asks for."""
        return await super().request(request)

    async def could(self, request: Request) -> dict[str, Any]:
        """Return the forecast of a request, regardless of what was chosen for its server."""
        return await super().forecast(request)

    async def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        async with self._asking.setdefault(mark_of(request.client), asyncio.Lock()):
            request = await self._within_ceiling(request)
            lease = await super().request(request)
        if wait_s <= 0:
            return lease
        return await self.wait(lease.id, request.owner, wait_s, until_settled=True)

    async def forecast(self, request: Request) -> dict[str, Any]:
        try:
            request = await self._within_ceiling(request)
        except (ImpossibleRequest, PermissionDenied, NoCapacity) as e:
            return {"outcome": "impossible", "position": None, "reason": str(e), "slices": []}
        return await super().forecast(request)

    async def resize(
        self, lease_id: str, owner: str | None, partial: float | None, memory_mib: int | None
    ) -> Lease:
        if owner is not None:
            lease = await self.wait(lease_id, owner, 0.0)
            ceiling = self._ceiling(lease.request)
            await self._check_share(
                replace(lease.request, partial=partial, memory_mib=memory_mib), ceiling.choice
            )
        return await super().resize(lease_id, owner, partial, memory_mib)

    async def of_server(self, owner: str, mark: str) -> list[Lease]:
        """Return the live leases of the server with that mark."""
        return [lease for lease in await self.leases(owner) if mark_of(lease.request.client) == mark]

    def _ceiling(self, request: Request) -> Ceiling:
        ceiling = self.ceilings.get(mark_of(request.client))
        if ceiling is None:
            raise PermissionDenied(
                "no GPUs were chosen for this server; stop it, and choose GPU slices when you start it again"
            )
        return ceiling

    async def _within_ceiling(self, request: Request) -> Request:
        ceiling = self._ceiling(request)
        choice = ceiling.choice
        if ceiling.lent:
            raise PermissionDenied(
                f"all kernels of this server share the GPU slices that were chosen for it ({choice}); "
                "for others, stop the server and start it again"
            )
        if request.num_gpus > choice.num_gpus:
            raise ImpossibleRequest(
                f"{_gpus(request.num_gpus)} requested, but {choice} was chosen for this server; request less"
            )
        await self._check_share(request, choice)
        if choice.model:
            if request.filters.get("name", choice.model) != choice.model:
                raise ImpossibleRequest(f"{choice.model} was chosen for this server; request that model")
            request = replace(request, filters={**request.filters, "name": choice.model})
        others = [
            lease
            for lease in await self.of_server(request.owner, mark_of(request.client))
            if lease.id != request.id
        ]
        held = sum(lease.request.num_gpus for lease in others)
        if held + request.num_gpus > choice.num_gpus:
            raise NoCapacity(
                f"the kernels of this server have, or wait for, {_gpus(held)} of the {choice.num_gpus} that were "
                "chosen for it; shut one of them down, or release its GPUs"
            )
        return request

    async def _check_share(self, request: Request, choice: GPUOptions) -> None:
        if request.memory_mib is not None:
            if isinstance(request.memory_mib, bool) or not isinstance(request.memory_mib, int):
                raise InvalidRequest("the memory per GPU must be a number of MiB")
            servers = (await self.pool(None))["servers"]
            least = min((gpu["memory_mib"] for server in servers for gpu in server["gpus"]), default=0)
            too_much = request.memory_mib > math.floor(choice.partial * least)
        else:
            # The pool itself refuses a share of another type.
            too_much = isinstance(request.partial, (int, float)) and request.partial > choice.partial
        if too_much:
            raise ImpossibleRequest(
                f"more than {choice.partial:g} of each GPU requested, but {choice} was chosen for this server; "
                "request less"
            )


def mark_of(client: str) -> str:
    """Return the mark of a request's server; empty if it has none."""
    before, sign, server = client.rpartition(MARK)
    return f"{sign}{server}" if sign else ""


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"
