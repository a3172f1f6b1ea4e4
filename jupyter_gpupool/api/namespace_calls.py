"""The calls about namespaces, about a lease's end and its holder, and about who asked for what."""

from __future__ import annotations

import math
from typing import Any

from ..pool.audit import MOST
from ..pool.errors import InvalidRequest
from .calls import Calls, check_types

_CHANGE: dict[str, tuple[type, ...]] = {
    "description": (str,),
    "limits": (dict,),
    "weight": (int, float),
    "names_holders": (bool,),
    "members": (dict,),
}
_NEW = {"name": (str,), **_CHANGE}


class WhoAmICall(Calls):
    async def read(self) -> None:
        self.reply(await self.service.tenants.whoami(self.scope(), self.namespace()))


class NamespacesCall(Calls):
    async def read(self) -> None:
        self.reply({"namespaces": await self.service.tenants.namespaces(self.scope())})

    async def create(self) -> None:
        body = self.body()
        check_types(body, _NEW)
        if "name" not in body:
            raise InvalidRequest("name is missing: what is the namespace called?")
        fields = {name: value for name, value in body.items() if name != "name"}
        self.reply(await self.service.tenants.create_namespace(self.scope(), body["name"], fields), 201)


class NamespaceCall(Calls):
    async def change(self, name: str) -> None:
        body = self.body()
        check_types(body, _CHANGE)
        self.reply(await self.service.tenants.change_namespace(self.scope(), name, body))

    async def remove(self, name: str) -> None:
        self.reply(await self.service.tenants.delete_namespace(self.scope(), name))


class MemberCall(Calls):
    async def replace(self, name: str, user: str) -> None:
        body = self.body()
        check_types(body, {"role": (str,)})
        if "role" not in body:
            raise InvalidRequest("role is missing: view, use or administer?")
        self.reply(await self.service.tenants.set_member(self.scope(), name, user, body["role"]))

    async def remove(self, name: str, user: str) -> None:
        self.reply(await self.service.tenants.remove_member(self.scope(), name, user))


class AskCall(Calls):
    async def create(self, lease_id: str) -> None:
        body = self.body()
        check_types(body, {"message": (str,)})
        self.reply(await self.service.tenants.ask(self.scope(), lease_id, body.get("message", "")))


class KeepCall(Calls):
    async def create(self, lease_id: str) -> None:
        self.reply((await self.service.tenants.keep(self.scope(), lease_id)).to_json())


class AuditCall(Calls):
    administrators_only = True

    async def read(self) -> None:
        limit = self.number("limit")
        if limit is not None and not 1 <= limit <= MOST:
            raise InvalidRequest(f"limit={limit:g}: give a number from 1 to {MOST}")
        entries = await self.service.tenants.audit(
            self.scope(), self.number("since") or 0.0, math.floor(limit or 200)
        )
        self.reply({"entries": entries})


_NAME = r"([0-9A-Za-z._-]{1,63})"
_LEASE_ID = r"([0-9A-Za-z-]{1,64})"

#: Path below the prefix → the call.
ROUTES: list[tuple[str, type[Any]]] = [
    ("/whoami", WhoAmICall),
    ("/namespaces", NamespacesCall),
    (f"/namespaces/{_NAME}", NamespaceCall),
    (rf"/namespaces/{_NAME}/members/([^/]{{1,600}})", MemberCall),
    (f"/leases/{_LEASE_ID}/ask", AskCall),
    (f"/leases/{_LEASE_ID}/keep", KeepCall),
    ("/audit", AuditCall),
]
