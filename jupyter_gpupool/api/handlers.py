"""The pool over HTTP. One set of calls, two families of handlers: a pool's own server, whose callers
show a token, and Jupyter Server, which knows its users and what they may do."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web

from ..pool.audit import acting
from ..pool.errors import InvalidRequest, NotAdmitted, NotAllowed
from ..pool.models import Request
from . import health, namespace_calls, traces
from .auth import Caller, Doorkeeper, who_calls
from .calls import MAX_BODY, PREFIX, RESIZABLE, Calls, check_types, parse_request
from .events import EventsInJupyter, EventsWithToken
from .feed import Feed
from .openapi import document
from .service import PoolService

__all__ = [
    "MAX_BODY",
    "PREFIX",
    "Calls",
    "check_types",
    "in_jupyter",
    "jupyter_handlers",
    "standalone_application",
    "standalone_handlers",
]


class PoolCall(Calls):
    async def read(self) -> None:
        self.reply(await self.service.pool(self.scope()))


class LeasesCall(Calls):
    async def read(self) -> None:
        scope = self.mine() if self.flag("mine") else self.scope()
        leases = await self.service.leases(scope, self.flag("all"))
        if self.flag("mine") and scope is not None:  # without those of others that the caller administers
            leases = [lease for lease in leases if lease.request.owner == scope]
        self.reply({"leases": [lease.to_json() for lease in leases]})

    async def create(self) -> None:
        request = await self.admitted(parse_request(self.body(), self.owner()))
        wait_s = self.seconds("wait")
        self.expects(request.id)
        with traces.current.request(self.request.headers, request):
            lease = await self.service.request(request, wait_s)
        await self.keeps(lease.id)
        self.reply(lease.to_json(), 201 if lease.state.holds else 202)


class LeaseCall(Calls):
    last_rights = ("GET", "DELETE")

    async def read(self, lease_id: str) -> None:
        position = self.get_query_argument("position", "")
        if position and not re.fullmatch(r"[0-9]{1,9}", position):
            raise InvalidRequest(f"position={position[:40]}: give a number")
        lease = await self.service.wait(
            lease_id,
            self.scope(),
            self.seconds("wait"),
            self.get_query_argument("state", None),
            int(position) if position else None,
        )
        self.reply(lease.to_json())

    async def change(self, lease_id: str) -> None:
        body = self.body()
        check_types(body, {**RESIZABLE, "extend_s": (int, float)})
        if "extend_s" in body:
            if len(body) > 1:
                raise InvalidRequest("extend a lease or resize it, one at a time")
            extended = await self.service.tenants.extend(self.scope(), lease_id, body["extend_s"])
            self.reply(extended.to_json())
            return
        if "num_gpus" in body:
            count = (await self.service.wait(lease_id, self.scope(), 0.0)).request.num_gpus
            if body["num_gpus"] != count:
                raise InvalidRequest(
                    f"a lease keeps its number of GPUs ({count}), only their memory can change; "
                    f"to have {body['num_gpus']}, release it and make a new request"
                )
        resized = await self.service.resize(
            lease_id, self.scope(), body.get("partial"), body.get("memory_mib")
        )
        self.reply(resized.to_json())

    async def remove(self, lease_id: str) -> None:
        self.reply((await self.service.release(lease_id, self.scope())).to_json())


class ForecastCall(Calls):
    async def read(self) -> None:
        request = await self.admitted(parse_request(self._asked(), self.owner()))
        self.reply(await self.service.forecast(request))

    def _asked(self) -> dict[str, Any]:
        """The query as the body of a request, of an id and a secret that nobody will use."""
        filters = {}
        for text in self.get_query_arguments("filter"):
            key, sign, value = text.partition("=")
            if not sign:
                raise InvalidRequest(f"filter={text[:40]}: write it as filter=name=V100")
            filters[key] = value
        body: dict[str, Any] = {
            "id": str(uuid.uuid4()),
            "secret_sha256": "0" * 64,
            "partial": self.number("partial"),
            "filters": filters,
            "spread": self.flag("spread"),
            "namespace": self.get_query_argument("namespace", "default"),
        }
        for name in ("num_gpus", "memory_mib"):
            text = self.get_query_argument(name, "")
            if text:
                if not re.fullmatch(r"[0-9]{1,9}", text):
                    raise InvalidRequest(f"{name}={text[:40]}: give a whole number")
                body[name] = int(text)
        return body


class HeartbeatCall(Calls):
    last_rights = ("POST",)

    async def create(self, lease_id: str) -> None:
        lease = await self.service.heartbeat(lease_id, self.scope())
        await self.keeps(lease_id)
        self.reply(lease.to_json())


class HistoryCall(Calls):
    async def read(self) -> None:
        gpus = self.get_query_arguments("gpu")
        step = self.number("step")
        self.reply(
            await self.service.history(
                self.number("since"),
                None if step is None else math.ceil(step),
                None if "all" in gpus else gpus[:64],
            )
        )


class HealthCall(Calls):
    async def read(self) -> None:
        at, checks = await self.service.health()
        body = health.document(at, checks, time.time())
        self.reply(body, 503 if body["status"] == "failing" else 200)


class OpenAPICall(Calls):
    async def read(self) -> None:
        self.reply(document())


class NoSuchCall(Calls):
    async def read(self, path: str = "") -> None:
        raise web.HTTPError(404, "there is no such call; see openapi.json")

    create = replace = change = remove = read


_LEASE_ID = r"([0-9A-Za-z-]{1,64})"

#: Path below PREFIX → the call.
ROUTES: list[tuple[str, type[Calls]]] = [
    ("/pool", PoolCall),
    ("/history", HistoryCall),
    ("/leases", LeasesCall),
    (f"/leases/{_LEASE_ID}", LeaseCall),
    (f"/leases/{_LEASE_ID}/heartbeat", HeartbeatCall),
    ("/health", HealthCall),
    ("/forecast", ForecastCall),
    *namespace_calls.ROUTES,
    (r"/openapi\.json", OpenAPICall),
    (r"/(.*)", NoSuchCall),
]


# -- a pool's own server


class _WithToken(Calls):
    """The caller is who the token says."""

    caller: Caller

    async def prepare(self) -> None:
        assert self.tokens is not None
        caller = await who_calls(self.tokens, self.request)
        if caller.objection:
            if self.request.method not in self.last_rights:
                raise NotAdmitted(caller.objection)
            caller = replace(caller, administers=False)
        if self.administrators_only and not caller.administers:
            raise NotAllowed("that takes an administrator's token; ask who gave you yours")
        self.caller = caller
        acting.set(caller.owner)
        self.settings.get("admitted", lambda request: None)(self.request)

    def owner(self) -> str:
        return self.caller.owner

    def scope(self) -> str | None:
        return self.caller.scope

    def mine(self) -> str | None:
        return self.caller.owner if self.caller.token else self.scope()

    def namespace(self) -> str:
        return self.caller.namespace or super().namespace()

    async def admitted(self, request: Request) -> Request:
        return await super().admitted(self.caller.admitted(request))

    def expects(self, lease_id: str) -> None:
        assert self.tokens is not None
        self.tokens.expects(self.caller, lease_id)

    async def keeps(self, lease_id: str) -> None:
        assert self.tokens is not None
        if self.caller.cut:
            await self.service.release(lease_id, self.scope(), "its token was revoked")
            raise NotAdmitted(self.caller.objection)
        self.tokens.note(self.caller, lease_id)

    def set_default_headers(self) -> None:
        self.clear_header("Server")  # whoever is not admitted need not know what runs here
        self.set_header("X-Content-Type-Options", "nosniff")

    def check_xsrf_cookie(self) -> None:
        pass  # no cookies here: the token itself is what another site cannot send


# -- inside Jupyter Server


class _InJupyter(Calls, APIHandler):
    """Jupyter Server's own identity, authorizer (resource ``gpupool``) and cross-site protection."""

    auth_resource = "gpupool"

    def owner(self) -> str:
        return self.current_user.username

    def scope(self) -> str | None:
        return self.service.scope(self.owner())

    def get_login_url(self) -> str:
        # An API answers 403; it never redirects a program to a login page.
        raise web.HTTPError(403, "this Jupyter server wants you to log in, or its token")

    write_error = Calls.write_error


def with_token(call: type[Calls]) -> type[Calls]:
    """The handler of a call in a pool's own server."""
    members: dict[str, Any] = {}
    for verb, name in _VERBS.items():
        if hasattr(call, name):
            members[verb] = getattr(call, name)
    return type(f"{call.__name__}WithToken", (_WithToken, call), members)


def in_jupyter(call: type[Calls]) -> type[Calls]:
    """The handler of a call under Jupyter Server's rules."""
    members: dict[str, Any] = {}
    for verb, name in _VERBS.items():
        if hasattr(call, name):
            allowed = authorized("write") if call.administrators_only else authorized
            members[verb] = web.authenticated(allowed(_plain(getattr(call, name))))
    return type(f"{call.__name__}InJupyter", (_InJupyter, call), members)


def _plain(method: Any) -> Any:
    """A function of its own name and identity for each verb: decorators must not stack on a shared one."""

    async def call(self: Any, *args: Any) -> Any:
        acting.set(self.service.named(self.owner()))
        return await method(self, *args)

    return call


_VERBS = {"get": "read", "post": "create", "put": "replace", "patch": "change", "delete": "remove"}


def standalone_application(
    service: PoolService,
    tokens: Doorkeeper,
    more: Sequence[tuple[str, type[Calls]]] = (),
    beside: Sequence[tuple[str, type[Calls]]] = (),
    **settings: Any,
) -> web.Application:
    """A tornado application of the pool's own, which answers whatever it is asked as the pool does."""
    return web.Application(
        standalone_handlers(service, tokens, more, beside),
        default_handler_class=with_token(NoSuchCall),
        default_handler_args={"service": service, "tokens": tokens},
        **settings,
    )


def standalone_handlers(
    service: PoolService,
    tokens: Doorkeeper,
    more: Sequence[tuple[str, type[Calls]]] = (),
    beside: Sequence[tuple[str, type[Calls]]] = (),
) -> list[tuple]:
    """Handlers for a tornado application of the pool's own; ``more``: calls that not every pool has, ``beside``:
    calls that are not below the API's path."""
    arguments = {"service": service, "tokens": tokens}
    events = (f"{PREFIX}/events", EventsWithToken, {"feed": Feed(service), "tokens": tokens})
    routes = [*((f"{PREFIX}{path}", call) for path, call in (*more, *ROUTES)), *beside]
    return [events, *((path, with_token(call), arguments) for path, call in routes)]


def jupyter_handlers(service: PoolService, events_in: type[EventsInJupyter] = EventsInJupyter) -> list[tuple]:
    """Handlers for Jupyter Server, which adds its base URL."""
    events = (f"{PREFIX}/events", events_in, {"feed": Feed(service)})
    return [events, *((f"{PREFIX}{path}", in_jupyter(call), {"service": service}) for path, call in ROUTES)]
