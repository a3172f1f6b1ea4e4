"""The calls about namespaces and their leases, of a pool that is hosted here or joined."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ..api.client import PoolClient

#: Has a call answered by the pool of now: ``ask(lambda pool, owner: …, owner)``.
_Ask = Callable[[Callable[[Any, str | None], Awaitable[Any]], str | None], Awaitable[Any]]


class TenantsWherever:
    """Each call of :class:`~jupyter_gpupool.api.tenants.Tenants`, passed on to the pool that there is now."""

    def __init__(self, ask: _Ask) -> None:
        self._ask = ask

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(owner: str | None, *args: Any) -> Any:
            return await self._ask(lambda pool, of: getattr(pool.tenants, name)(of, *args), owner)

        return call


class TenantsElsewhere:
    """The same calls, answered by the pool of another process: who asks is whom its token names."""

    def __init__(self, client: PoolClient) -> None:
        self._client = client

    async def check_use(self, owner: str | None, namespace: str, request_id: str = "") -> None:
        """That pool knows."""

    async def whoami(self, owner: str | None, namespace: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.whoami)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(owner: str | None, *args: Any) -> Any:
            return await asyncio.to_thread(getattr(self._client, name), *args)

        return call
