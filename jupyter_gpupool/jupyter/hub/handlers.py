"""The calls that only a hub's pool has, and the way in for browsers that are logged in at the hub."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jupyterhub.services.auth import HubOAuthCallbackHandler, HubOAuthenticated
from tornado import web

from ...api.console import console_handlers
from ...api.events import EventsWithToken
from ...api.feed import Feed
from ...api.handlers import _VERBS, PREFIX, ROUTES, Calls, _WithToken, check_types
from ...pool.audit import acting
from ...pool.errors import InvalidRequest, NotAdmitted, NotAllowed, PoolError
from .identity import HubCaller, HubTokens
from .options import MODES, Choice
from .page import HubConsoleFiles, PageHandler
from .pool import HubPool
from .servers import Servers

_BODY: dict[str, tuple[type, ...]] = {"groups": (list,), "lease": (str,), "mode": (str,), "choice": (dict,)}
_CHOICE: dict[str, tuple[type, ...]] = {"num_gpus": (int,), "partial": (int, float), "model": (str,)}


class _HubCalls(Calls):
    """For the hub itself."""

    caller: HubCaller
    tokens: HubTokens
    servers: Servers

    def check(self) -> None:
        if not self.caller.hub:
            raise NotAllowed("only the hub itself may ask that")

    def server(self) -> tuple[str, str]:
        return self.get_query_argument("user"), self.get_query_argument("server", "")


class OfferCall(_HubCalls):
    """``{"servers": [{"gpus": [{name, memory_mib, granted_mib, healthy, emulated}]}], "reason"}``; nobody's leases."""

    async def read(self) -> None:
        self.check()
        kept = ("name", "memory_mib", "granted_mib", "healthy", "emulated")
        said = await self.service.pool("")
        servers = [{"gpus": [{k: gpu[k] for k in kept} for gpu in s["gpus"]]} for s in said["servers"]]
        self.reply({"servers": servers, "reason": ""})


class ServerCall(_HubCalls):
    """A server of a user, from its start to its stop."""

    async def replace(self) -> None:
        self.check()
        body = self.body()
        check_types(body, _BODY)
        if set(body) != set(_BODY) or body["mode"] not in MODES:
            raise InvalidRequest(f"a start has {', '.join(_BODY)}; its mode is one of {', '.join(MODES)}")
        check_types(body["choice"], _CHOICE)
        namespace = self.tokens.namespace([str(group) for group in body["groups"]])
        choice = Choice(**body["choice"])
        self.reply(await self.servers.begin(*self.server(), namespace, body["lease"], body["mode"], choice))

    async def read(self) -> None:
        self.check()
        position = self.number("position")
        self.reply(
            await self.servers.news(
                *self.server(),
                self.seconds("wait"),
                self.get_query_argument("state", ""),
                None if position is None else int(position),
            )
        )

    async def remove(self) -> None:
        self.check()
        await self.servers.end(*self.server(), self.get_query_argument("lease", ""))
        self.reply({})


class MineCall(_HubCalls):
    """For a server: what was chosen for it, and the lease that it is to take hold of."""

    last_rights = ("GET", "POST")

    def me(self) -> tuple[str, str]:
        if self.caller.server is None:
            raise NotAllowed("only a server of this hub may ask that")
        return self.caller.owner, self.caller.server

    async def read(self) -> None:
        self.reply(await self.servers.of(*self.me()))

    async def create(self) -> None:
        """It holds its lease now."""
        await self.servers.taken(*self.me())
        self.reply({})


HUB_ROUTES: list[tuple[str, type[Calls]]] = [
    ("/hub/offer", OfferCall),
    ("/hub/server", ServerCall),
    ("/hub/mine", MineCall),
]


class _InHub(HubOAuthenticated, _WithToken):
    """A program shows a token of the hub; a browser has logged in there."""

    tokens: HubTokens

    async def prepare(self) -> None:
        if "Authorization" in self.request.headers:
            await super().prepare()
            return
        self.caller = await browser(self, self.tokens)
        if self.administrators_only and not self.caller.administers:
            raise NotAllowed("that is for administrators of the hub")
        acting.set(self.caller.owner)

    def check_xsrf_cookie(self) -> None:
        pass  # before anybody is known; :func:`browser` does it


class _EventsInHub(HubOAuthenticated, EventsWithToken):
    tokens: HubTokens

    async def prepare(self) -> None:
        if "Authorization" in self.request.headers:
            await super().prepare()
            return
        try:
            self.caller = await browser(self, self.tokens)
        except (PoolError, web.HTTPError) as e:
            self.set_status(e.status if isinstance(e, PoolError) else e.status_code)
            self.finish({"error": type(e).__name__, "message": str(e)})

    def check_xsrf_cookie(self) -> None:
        pass

    def check_origin(self, origin: str) -> bool:
        """A browser's cookie goes along from every page; a token does not."""
        return "Authorization" in self.request.headers or super(EventsWithToken, self).check_origin(origin)


async def browser(handler: Any, tokens: HubTokens) -> HubCaller:
    """Who is logged in in this browser. Raises NotAdmitted, and HTTPError where another site may have sent it."""
    model = await handler.hub_auth.get_user(handler, sync=False)
    caller = tokens.of_model(model, trusted=True) if model else None
    if caller is None:
        raise NotAdmitted("log in at the hub, and open the GPU pool's page there")
    if handler.request.method not in ("GET", "HEAD", "OPTIONS"):
        handler.hub_auth.check_xsrf_cookie(handler)
    return replace(caller, server=None)


def hub_handlers(prefix: str, service: HubPool, tokens: HubTokens, servers: Servers) -> list[tuple]:
    """All of the service, below its prefix at the hub."""
    prefix = prefix.rstrip("/")
    known = {"service": service, "tokens": tokens}
    calls = [
        (f"{prefix}{PREFIX}{path}", _in_hub(call, servers), known) for path, call in (*HUB_ROUTES, *ROUTES)
    ]
    events = (f"{prefix}{PREFIX}/events", _EventsInHub, {"feed": Feed(service), "tokens": tokens})
    return [
        (f"{prefix}/oauth_callback", HubOAuthCallbackHandler),
        (f"{prefix}/?", PageHandler, known),
        *console_handlers(HubConsoleFiles, prefix),
        events,
        *calls,
    ]


def _in_hub(call: type[Calls], servers: Servers) -> type[Calls]:
    members: dict[str, Any] = {v: getattr(call, name) for v, name in _VERBS.items() if hasattr(call, name)}
    return type(f"{call.__name__}InHub", (_InHub, call), {**members, "servers": servers})
