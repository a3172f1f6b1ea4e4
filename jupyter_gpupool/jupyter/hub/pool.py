"""The hub's pool: one for all users, in which a server has what was chosen for it and no more."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from ...api.service import PoolService
from ...pool.errors import ImpossibleRequest, InvalidRequest, NoCapacity, NotAllowed
from ...pool.models import Lease, Request
from .identity import MARK
from .options import Choice


@dataclass(frozen=True)
class Ceiling:
    """What one server's leases may come to together. ``lent``: its one lease, taken at its start; or empty."""

    choice: Choice
    lent: str = ""


class HubPool(PoolService):
    """Requests come from servers, which their mark names; see :func:`.identity.marked`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: By mark.
        self.ceilings: dict[str, Ceiling] = {}
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def lend(self, request: Request) -> Lease:
        """A server's own lease, on the hub's word."""
        return await super().request(request)

    async def could(self, request: Request) -> dict[str, Any]:
        """What it would come to, whatever was chosen for its server."""
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
        except (ImpossibleRequest, NotAllowed, NoCapacity) as e:
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
        """Its live leases."""
        return [lease for lease in await self.leases(owner) if mark_of(lease.request.client) == mark]

    def _ceiling(self, request: Request) -> Ceiling:
        ceiling = self.ceilings.get(mark_of(request.client))
        if ceiling is None:
            raise NotAllowed(
                "no GPUs were chosen for this server; stop it, and choose some when you start it"
            )
        return ceiling

    async def _within_ceiling(self, request: Request) -> Request:
        ceiling = self._ceiling(request)
        choice = ceiling.choice
        if ceiling.lent:
            raise NotAllowed(
                f"every kernel of this server has the {choice} that were chosen when it was started; "
                "stop it, and choose others, for more"
            )
        if request.num_gpus > choice.num_gpus:
            raise ImpossibleRequest(
                f"{_gpus(request.num_gpus)} asked for; {choice} was chosen for this server"
            )
        await self._check_share(request, choice)
        if choice.model:
            if request.filters.get("name", choice.model) != choice.model:
                raise ImpossibleRequest(
                    f"{choice.model} was chosen for this server, and it is lent no other GPU"
                )
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

    async def _check_share(self, request: Request, choice: Choice) -> None:
        if request.memory_mib is not None:
            if isinstance(request.memory_mib, bool) or not isinstance(request.memory_mib, int):
                raise InvalidRequest("the memory per GPU must be a number of MiB")
            servers = (await self.pool(None))["servers"]
            least = min((gpu["memory_mib"] for server in servers for gpu in server["gpus"]), default=0)
            too_much = request.memory_mib > math.floor(choice.partial * least)
        else:
            # What is no share at all is for the pool to say.
            too_much = isinstance(request.partial, (int, float)) and request.partial > choice.partial
        if too_much:
            raise ImpossibleRequest(
                f"more than {choice.partial:g} of each GPU asked for; {choice} was chosen for this server"
            )


def mark_of(client: str) -> str:
    """The mark of the server that a request came from; empty without."""
    before, sign, server = client.rpartition(MARK)
    return f"{sign}{server}" if sign else ""


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"
