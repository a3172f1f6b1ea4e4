"""The pool over HTTP. One set of calls, two families of handlers: a pool's own server, whose callers
show a token, and Jupyter Server, which knows its users and what they may do."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web

from ..pool.errors import InvalidRequest, NotAdmitted, NotAllowed, PoolError
from ..pool.models import Request
from . import health
from .auth import Caller, Doorkeeper, who_calls
from .events import EventsInJupyter, EventsWithToken
from .feed import Feed
from .openapi import document
from .service import PoolService

PREFIX = "/gpupool/api/v1"
MAX_BODY = 64 * 1024
MAX_WAIT_S = 30.0

#: Field of a request's body → the JSON types it may have.
_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "num_gpus": (int,),
    "partial": (int, float, type(None)),
    "memory_mib": (int, type(None)),
    "filters": (dict,),
    "namespace": (str,),
    "wait": (bool,),
    "secret_sha256": (str,),
    "label": (str,),
    "client": (str,),
}


#: The same of a body that resizes a lease.
_RESIZABLE = {name: _FIELDS[name] for name in ("num_gpus", "partial", "memory_mib")}


class Calls(web.RequestHandler):
    """What every handler shares: the pool, who calls, and how a refusal is told."""

    service: PoolService
    #: The verbs that a token still has when it has expired or was revoked: for what it asked for before.
    last_rights: Sequence[str] = ()
    administrators_only = False
    #: The PoolError by which the call was refused.
    refusal = ""

    def initialize(self, service: PoolService, tokens: Doorkeeper | None = None) -> None:
        self.service = service
        self.tokens = tokens

    def owner(self) -> str:
        """The name whose leases these are."""
        raise NotImplementedError

    def scope(self) -> str | None:
        """Whose leases the caller may see and release: its own, or (None) everybody's."""
        return self.owner()

    def mine(self) -> str | None:
        """The scope of the caller's own leases."""
        return self.scope()

    def admitted(self, request: Request) -> Request:
        """The request as the caller may make it. Raises NotAllowed."""
        return request

    def expects(self, lease_id: str) -> None:
        """The caller asks for a lease of that id."""

    async def keeps(self, lease_id: str) -> None:
        """The caller says that it wants this lease. Raises NotAdmitted where it has lost it."""

    def reply(self, value: Any, status: int = 200) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, PoolError):
            self.refusal = type(error).__name__
            self.reply({"error": type(error).__name__, "message": str(error)}, error.status)
            return
        reason = getattr(error, "log_message", None) or getattr(error, "reason", None) or self._reason
        self.reply({"error": type(error).__name__ if error else "Error", "message": str(reason)}, status_code)

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        if not isinstance(value, PoolError):
            super().log_exception(kind, value, trace)

    def seconds(self, name: str) -> float:
        """A query argument in seconds, at most :data:`MAX_WAIT_S`."""
        text = self.get_query_argument(name, "0")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not value >= 0:
            raise InvalidRequest(f"{name}={text[:40]}: give seconds from 0 up")
        return min(value, MAX_WAIT_S)

    def number(self, name: str) -> float | None:
        """A query argument that is a finite number; None without it."""
        text = self.get_query_argument(name, None)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not abs(value) < 1e12:
            raise InvalidRequest(f"{name}={text[:40]}: give a number")
        return value

    def flag(self, name: str) -> bool:
        return self.get_query_argument(name, "0") in ("1", "true")

    def body(self) -> dict[str, Any]:
        if len(self.request.body) > MAX_BODY:
            raise InvalidRequest(f"the body has {len(self.request.body)} bytes; {MAX_BODY} are allowed")
        try:
            value = json.loads(self.request.body or b"{}")
        except (ValueError, RecursionError):
            raise InvalidRequest("the body is not JSON") from None
        if not isinstance(value, dict):
            raise InvalidRequest("the body is not a JSON object")
        return value


def parse_request(body: dict[str, Any], owner: str) -> Request:
    """The request that a body asks for; ``owner`` never comes from it. Raises InvalidRequest."""
    check_types(body, _FIELDS)
    filters = body.get("filters", {})
    if not all(isinstance(v, str) for v in filters.values()):
        raise InvalidRequest("filters maps names to text")
    if "id" not in body:
        raise InvalidRequest("id is missing: choose a uuid, so that the request can be repeated safely")
    return Request(**{**body, "owner": owner})


def check_types(body: dict[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Raise InvalidRequest unless a body has those fields only, with values of their types."""
    unknown = sorted(set(body) - set(fields))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0][:40]!r}; known are {', '.join(fields)}")
    for name, value in body.items():
        kinds = fields[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise InvalidRequest(f"{name} is a {type(value).__name__}, not {wanted}")


class PoolCall(Calls):
    async def read(self) -> None:
        self.reply(await self.service.pool(self.scope()))


class LeasesCall(Calls):
    async def read(self) -> None:
        scope = self.mine() if self.flag("mine") else self.scope()
        leases = await self.service.leases(scope, self.flag("all"))
        self.reply({"leases": [lease.to_json() for lease in leases]})

    async def create(self) -> None:
        request = self.admitted(parse_request(self.body(), self.owner()))
        wait_s = self.seconds("wait")
        self.expects(request.id)
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
        check_types(body, _RESIZABLE)
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
        request = self.admitted(parse_request(self._asked(), self.owner()))
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
        self.settings.get("admitted", lambda request: None)(self.request)

    def owner(self) -> str:
        return self.caller.owner

    def scope(self) -> str | None:
        return self.caller.scope

    def mine(self) -> str | None:
        return self.caller.owner if self.caller.token else self.scope()

    def admitted(self, request: Request) -> Request:
        return self.caller.admitted(request)

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
            members[verb] = web.authenticated(authorized(_plain(getattr(call, name))))
    return type(f"{call.__name__}InJupyter", (_InJupyter, call), members)


def _plain(method: Any) -> Any:
    """A function of its own name and identity for each verb: decorators must not stack on a shared one."""

    async def call(self: Any, *args: Any) -> Any:
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


def jupyter_handlers(service: PoolService) -> list[tuple]:
    """Handlers for Jupyter Server, which adds its base URL."""
    events = (f"{PREFIX}/events", EventsInJupyter, {"feed": Feed(service)})
    return [events, *((f"{PREFIX}{path}", in_jupyter(call), {"service": service}) for path, call in ROUTES)]
