"""Namespaces, members and audit trail of the user's pool, whether this process hosts that pool or has joined it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.server.service.backend import TenantsBackend

T = TypeVar("T")

#: A call of a pool's tenants.
_Call = Callable[[TenantsBackend], Awaitable[Any]]


class DelegatingTenants:
    """A :class:`TenantsBackend` that passes each call on to the tenants of the current pool.

    ``ask`` makes a call of the current pool's tenants.
    ``owner_of`` returns the owner that a caller is for the pool.
    """

    def __init__(
        self, ask: Callable[[_Call], Awaitable[Any]], owner_of: Callable[[str | None], str | None]
    ) -> None:
        self._ask = ask
        self._owner_of = owner_of

    async def whoami(self, owner: str | None, namespace: str) -> dict[str, Any]:
        return await self._passed(lambda tenants: tenants.whoami(self._owner_of(owner), namespace))

    async def check_use(self, owner: str | None, namespace: str, request_id: str = "") -> None:
        await self._passed(lambda tenants: tenants.check_use(self._owner_of(owner), namespace, request_id))

    async def namespaces(self, owner: str | None) -> list[dict[str, Any]]:
        return await self._passed(lambda tenants: tenants.namespaces(self._owner_of(owner)))

    async def create_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        return await self._passed(
            lambda tenants: tenants.create_namespace(self._owner_of(owner), name, fields)
        )

    async def change_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        return await self._passed(
            lambda tenants: tenants.change_namespace(self._owner_of(owner), name, fields)
        )

    async def delete_namespace(self, owner: str | None, name: str) -> dict[str, Any]:
        return await self._passed(lambda tenants: tenants.delete_namespace(self._owner_of(owner), name))

    async def set_member(self, owner: str | None, name: str, user: str, role: str) -> dict[str, Any]:
        return await self._passed(lambda tenants: tenants.set_member(self._owner_of(owner), name, user, role))

    async def remove_member(self, owner: str | None, name: str, user: str) -> dict[str, Any]:
        return await self._passed(lambda tenants: tenants.remove_member(self._owner_of(owner), name, user))

    async def extend(self, owner: str | None, lease_id: str, seconds: float) -> Lease:
        return await self._passed(lambda tenants: tenants.extend(self._owner_of(owner), lease_id, seconds))

    async def ask(self, owner: str | None, lease_id: str, message: str = "") -> dict[str, Any]:
        return await self._passed(lambda tenants: tenants.ask(self._owner_of(owner), lease_id, message))

    async def keep(self, owner: str | None, lease_id: str) -> Lease:
        return await self._passed(lambda tenants: tenants.keep(self._owner_of(owner), lease_id))

    async def audit(self, owner: str | None, since: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        return await self._passed(lambda tenants: tenants.audit(self._owner_of(owner), since, limit))

    async def usage(self, owner: str | None, by: str, since: float | None = None) -> dict[str, Any]:
        return await self._passed(lambda tenants: tenants.usage(self._owner_of(owner), by, since))

    async def _passed(self, call: Callable[[TenantsBackend], Awaitable[T]]) -> T:
        answer: T = await self._ask(call)
        return answer


class RemoteTenants:
    """A :class:`TenantsBackend` of a pool in another process, which takes the caller from the client's token."""

    def __init__(self, client: PoolClient) -> None:
        self._client = client

    async def whoami(self, owner: str | None, namespace: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.whoami)

    async def check_use(self, owner: str | None, namespace: str, request_id: str = "") -> None:
        """Do nothing: that pool checks each request itself."""

    async def namespaces(self, owner: str | None) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._client.namespaces)

    async def create_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.create_namespace, name, fields)

    async def change_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.change_namespace, name, fields)

    async def delete_namespace(self, owner: str | None, name: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.delete_namespace, name)

    async def set_member(self, owner: str | None, name: str, user: str, role: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.set_member, name, user, role)

    async def remove_member(self, owner: str | None, name: str, user: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.remove_member, name, user)

    async def extend(self, owner: str | None, lease_id: str, seconds: float) -> Lease:
        return await asyncio.to_thread(self._client.extend, lease_id, seconds)

    async def ask(self, owner: str | None, lease_id: str, message: str = "") -> dict[str, Any]:
        return await asyncio.to_thread(self._client.ask, lease_id, message)

    async def keep(self, owner: str | None, lease_id: str) -> Lease:
        return await asyncio.to_thread(self._client.keep, lease_id)

    async def audit(self, owner: str | None, since: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._client.audit, since, limit)

    async def usage(self, owner: str | None, by: str, since: float | None = None) -> dict[str, Any]:
        return await asyncio.to_thread(self._client.usage, by, since)
