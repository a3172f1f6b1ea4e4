"""The calls that only a hub's pool has, and the authentication of browsers that are logged in at the hub."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jupyterhub.services.auth import HubOAuthCallbackHandler, HubOAuthenticated
from tornado import web

from jupyter_gpupool.core.errors import PermissionDenied, PoolError, TooManyRequests, Unauthenticated
from jupyter_gpupool.hub.options import ServerStart
from jupyter_gpupool.server.access.authentication import Caller
from jupyter_gpupool.server.http.console import console_handlers
from jupyter_gpupool.server.http.events import EventsWithToken
from jupyter_gpupool.server.http.handlers import (
    PREFIX,
    ROUTES,
    BaseHandler,
    Route,
    with_arguments,
)
from jupyter_gpupool.server.service.backend import PoolBackend
from jupyter_gpupool.server.watch.feed import Feed

from .identity import HubCaller, HubTokens, Presented
from .page import HubConsoleFiles, PageHandler
from .pool import HubPool
from .user_servers import Servers


class _HubHandler(BaseHandler):
    """The base of these calls. ``servers`` are the users' servers that have GPUs."""

    caller: HubCaller
    authenticator: HubTokens

    def initialize(  # type: ignore[override]  # takes one more argument of the route
        self, service: PoolBackend, authenticator: HubTokens, servers: Servers
    ) -> None:
        super().initialize(service, authenticator)
        self.servers = servers

    def check(self) -> None:
        """Raise PermissionDenied unless the hub itself calls."""
        if not self.caller.hub:
            raise PermissionDenied("only the hub itself may make this call")

    def server(self) -> tuple[str, str]:
        """Return the user and the name of the server that the query names."""
        return self.get_query_argument("user"), self.get_query_argument("server", "")


class OfferHandler(_HubHandler):
    """``{"servers": [{"gpus": [{name, memory_mib, granted_mib, healthy, emulated}]}], "reason"}``, without leases."""

    @web.authenticated
    async def get(self) -> None:
        self.check()
        kept = ("name", "memory_mib", "granted_mib", "healthy", "emulated")
        said = await self.service.pool("")
        servers = [{"gpus": [{k: gpu[k] for k in kept} for gpu in s["gpus"]]} for s in said["servers"]]
        self.reply({"servers": servers, "reason": ""})


class ServerHandler(_HubHandler):
    """A user's server, from its start to its stop."""

    @web.authenticated
    async def put(self) -> None:
        self.check()
        start = ServerStart.from_json(self.body())
        namespace = self.authenticator.namespace(start.groups)
        self.reply(await self.servers.begin(*self.server(), namespace, start.lease, start.mode, start.choice))

    @web.authenticated
    async def get(self) -> None:
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

    @web.authenticated
    async def delete(self) -> None:
        self.check()
        await self.servers.end(*self.server(), self.get_query_argument("lease", ""))
        self.reply({})


class MineHandler(_HubHandler):
    """For a server: what was chosen for it, and the lease that it must hold."""

    last_rights = ("GET", "POST")

    def me(self) -> tuple[str, str]:
        """Return the user and the name of the calling server."""
        if self.caller.server is None:
            raise PermissionDenied("only a server of this hub may make this call")
        return self.caller.owner, self.caller.server

    @web.authenticated
    async def get(self) -> None:
        self.reply(await self.servers.of(*self.me()))

    @web.authenticated
    async def post(self) -> None:
        """Note that the server holds its lease now."""
        await self.servers.taken(*self.me())
        self.reply({})


class _InHub(HubOAuthenticated, BaseHandler):
    """Authenticates a program by a token of the hub, and a browser by its login there."""

    authenticator: HubTokens

    async def authenticate(self) -> Caller:
        if "Authorization" in self.request.headers:
            return await super().authenticate()
        caller = await browser(self, self.authenticator)
        if self.administrators_only and not caller.administers:
            raise PermissionDenied("this call is for administrators of the hub")
        self.current_user = caller
        return caller

    def check_xsrf_cookie(self) -> None:
        pass  # it would run before authentication; :func:`browser` checks the cookie


class _EventsInHub(HubOAuthenticated, EventsWithToken):
    tokens: HubTokens

    async def prepare(self) -> None:
        if "Authorization" in self.request.headers:
            await super().prepare()
            return
        try:
            self.caller = await browser(self, self.tokens)
            self.count()
        except (PoolError, web.HTTPError) as e:
            self.set_status(e.status if isinstance(e, PoolError) else e.status_code)
            if isinstance(e, TooManyRequests):
                self.set_header("Retry-After", str(math.ceil(e.retry_after_s)))
            self.finish({"error": type(e).__name__, "message": str(e)})

    def check_xsrf_cookie(self) -> None:
        pass

    def check_origin(self, origin: str) -> bool:
        """Check the origin of a browser: it sends its cookie from pages of any site. A token is not sent so."""
        return "Authorization" in self.request.headers or super(EventsWithToken, self).check_origin(origin)


async def browser(handler: Any, tokens: HubTokens) -> HubCaller:
    """Return who is logged in in this browser.

    Raises Unauthenticated, and HTTPError if another site may have sent the request.
    """
    model = await handler.hub_auth.get_user(handler, sync=False)
    caller = tokens.of_model(model, trusted=True) if model else None
    if caller is None:
        raise Unauthenticated("you are not logged in; log in at the hub, and open the GPU pool's page there")
    if handler.request.method not in ("GET", "HEAD", "OPTIONS"):
        handler.hub_auth.check_xsrf_cookie(handler)
    await tokens.note(caller)
    token = handler.hub_auth.get_token(handler)
    return replace(
        caller, server=None, presented=Presented(token, caller.scope, trusted=True) if token else None
    )


def hub_handlers(prefix: str, service: HubPool, tokens: HubTokens, servers: Servers) -> list[tuple[Any, ...]]:
    """Return all handlers of the service, below its prefix at the hub."""
    prefix = prefix.rstrip("/")
    arguments = {"servers": servers}
    hub_routes: list[Route] = [
        ("/hub/offer", OfferHandler, arguments),
        ("/hub/server", ServerHandler, arguments),
        ("/hub/mine", MineHandler, arguments),
    ]
    calls = [
        (path, _in_hub(handler), known)
        for path, handler, known in with_arguments(
            (*hub_routes, *ROUTES), f"{prefix}{PREFIX}", service, tokens
        )
    ]
    events = (f"{prefix}{PREFIX}/events", _EventsInHub, {"feed": Feed(service), "tokens": tokens})
    return [
        (f"{prefix}/oauth_callback", HubOAuthCallbackHandler),
        (f"{prefix}/?", PageHandler, {"service": service, "tokens": tokens}),
        *console_handlers(HubConsoleFiles, prefix),
        events,
        *calls,
    ]


def _in_hub(handler: type[BaseHandler]) -> type[BaseHandler]:
    """Return the handler under the hub's rules."""
    return type(f"{handler.__name__}InHub", (_InHub, handler), {})
