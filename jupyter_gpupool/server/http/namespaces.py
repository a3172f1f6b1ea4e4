"""The calls about namespaces, their members, the audit trail and the report of usage."""

from __future__ import annotations

import math

from tornado import web

from jupyter_gpupool.core.api import MAX_AUDIT_ENTRIES
from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Scope
from jupyter_gpupool.core.request_schema import check_types

from .base import BaseHandler, Route

_CHANGE: dict[str, tuple[type, ...]] = {
    "description": (str,),
    "limits": (dict,),
    "weight": (int, float),
    "names_holders": (bool,),
    "reclaim": (str, type(None)),
    "members": (dict,),
}
_NEW = {"name": (str,), **_CHANGE}


class WhoAmIHandler(BaseHandler):
    """``GET whoami`` returns the caller's name and roles."""

    @web.authenticated
    async def get(self) -> None:
        self.reply(await self.service.tenants.whoami(self.scope(), self.namespace()))


class NamespacesHandler(BaseHandler):
    """``GET namespaces`` lists the caller's namespaces; ``POST namespaces`` creates one."""

    changes_need = Scope.ADMINISTER

    @web.authenticated
    async def get(self) -> None:
        self.reply({"namespaces": await self.service.tenants.namespaces(self.scope())})

    @web.authenticated
    async def post(self) -> None:
        body = self.body()
        check_types(body, _NEW)
        if "name" not in body:
            raise InvalidRequest("name is missing: give the namespace a name")
        self.caller.check_within(body["name"])
        fields = {name: value for name, value in body.items() if name != "name"}
        self.reply(await self.service.tenants.create_namespace(self.scope(), body["name"], fields), 201)


class NamespaceHandler(BaseHandler):
    """``PATCH`` and ``DELETE namespaces/NAME``."""

    changes_need = Scope.ADMINISTER

    @web.authenticated
    async def patch(self, name: str) -> None:
        self.caller.check_within(name)
        body = self.body()
        check_types(body, _CHANGE)
        self.reply(await self.service.tenants.change_namespace(self.scope(), name, body))

    @web.authenticated
    async def delete(self, name: str) -> None:
        self.caller.check_within(name)
        self.reply(await self.service.tenants.delete_namespace(self.scope(), name))


class MemberHandler(BaseHandler):
    """``PUT`` and ``DELETE namespaces/NAME/members/USER``."""

    changes_need = Scope.ADMINISTER

    @web.authenticated
    async def put(self, name: str, user: str) -> None:
        self.caller.check_within(name)
        body = self.body()
        check_types(body, {"role": (str,)})
        if "role" not in body:
            raise InvalidRequest("role is missing: give view, use or administer")
        self.reply(await self.service.tenants.set_member(self.scope(), name, user, body["role"]))

    @web.authenticated
    async def delete(self, name: str, user: str) -> None:
        self.caller.check_within(name)
        self.reply(await self.service.tenants.remove_member(self.scope(), name, user))


class AuditHandler(BaseHandler):
    """``GET audit`` returns the newest entries of the audit trail."""

    administrators_only = True

    @web.authenticated
    async def get(self) -> None:
        limit = self.number("limit")
        if limit is not None and not 1 <= limit <= MAX_AUDIT_ENTRIES:
            raise InvalidRequest(f"limit={limit:g}: give a number from 1 to {MAX_AUDIT_ENTRIES}")
        entries = await self.service.tenants.audit(
            self.scope(), self.number("since") or 0.0, math.floor(limit or 200)
        )
        self.reply({"entries": entries})


class UsageHandler(BaseHandler):
    """``GET usage`` returns GPU-hours: the caller's, or everybody's for administrators."""

    @web.authenticated
    async def get(self) -> None:
        by = self.get_query_argument("by", "user")
        self.reply(await self.service.tenants.usage(self.scope(), by, self.number("since")))


_NAME = r"([0-9A-Za-z._-]{1,63})"

#: Path below the prefix → the handler.
ROUTES: list[Route] = [
    ("/whoami", WhoAmIHandler),
    ("/namespaces", NamespacesHandler),
    (f"/namespaces/{_NAME}", NamespaceHandler),
    (rf"/namespaces/{_NAME}/members/([^/]{{1,600}})", MemberHandler),
    ("/audit", AuditHandler),
    ("/usage", UsageHandler),
]
