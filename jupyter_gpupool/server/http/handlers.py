"""The pool over HTTP, in its own server and in Jupyter Server: which handler answers which path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jupyter_core.utils import ensure_async
from jupyter_server.auth.utils import HTTP_METHOD_TO_AUTH_ACTION
from jupyter_server.base.handlers import APIHandler
from tornado import web

from jupyter_gpupool.core.api import PREFIX
from jupyter_gpupool.server.access.authentication import Authenticator, Caller
from jupyter_gpupool.server.service.backend import PoolBackend
from jupyter_gpupool.server.watch.feed import Feed

from . import gpus, leases, namespaces, pool
from .base import MAX_BODY, BaseHandler, Route
from .events import EventsInJupyter, EventsWithToken

__all__ = [
    "MAX_BODY",
    "PREFIX",
    "InJupyter",
    "BaseHandler",
    "Route",
    "in_jupyter",
    "jupyter_handlers",
    "standalone_application",
    "standalone_handlers",
]

#: Path below PREFIX → the handler.
ROUTES: list[Route] = [
    *pool.ROUTES,
    *gpus.ROUTES,
    *leases.ROUTES,
    *namespaces.ROUTES,
    (r"/(.*)", pool.NoSuchHandler),
]


# -- a pool's own server


def standalone_application(
    service: PoolBackend,
    authenticator: Authenticator,
    more: Sequence[Route] = (),
    beside: Sequence[Route] = (),
    **settings: Any,
) -> web.Application:
    """Return a tornado application of the pool's own, which answers every path as the pool does."""
    return web.Application(
        standalone_handlers(service, authenticator, more, beside),
        default_handler_class=pool.NoSuchHandler,
        default_handler_args={"service": service, "authenticator": authenticator},
        **settings,
    )


def standalone_handlers(
    service: PoolBackend,
    authenticator: Authenticator,
    more: Sequence[Route] = (),
    beside: Sequence[Route] = (),
) -> list[tuple[Any, ...]]:
    """Return handlers for a tornado application of the pool's own.

    ``more`` are calls that not every pool has; ``beside`` are calls that are not below the API's path.
    """
    events = (f"{PREFIX}/events", EventsWithToken, {"feed": Feed(service), "tokens": authenticator})
    return [
        events,
        *with_arguments((*more, *ROUTES), PREFIX, service, authenticator),
        *with_arguments(beside, "", service, authenticator),
    ]


def with_arguments(
    routes: Sequence[Route], prefix: str, service: PoolBackend, authenticator: Authenticator
) -> list[tuple[Any, ...]]:
    """Return routes below ``prefix`` with what every handler's ``initialize`` takes, and what the route adds."""
    known = {"service": service, "authenticator": authenticator}
    return [(f"{prefix}{path}", handler, {**known, **dict(*more)}) for path, handler, *more in routes]


# -- inside Jupyter Server


class InJupyter(BaseHandler, APIHandler):
    """Jupyter Server's own identity, authorizer (resource ``gpupool``) and cross-site protection."""

    auth_resource = "gpupool"

    def initialize(self, service: PoolBackend) -> None:  # type: ignore[override]  # Jupyter Server authenticates
        self.service = service

    async def prepare(self, **kwargs: Any) -> None:
        await APIHandler.prepare(self)
        if self.request.method == "OPTIONS":  # a browser's preflight carries nobody's identity
            return
        await super().prepare()

    async def authenticate(self) -> Caller:
        user = self.current_user
        if not user:
            self.get_login_url()
        action = "write" if self.administrators_only else HTTP_METHOD_TO_AUTH_ACTION[str(self.request.method)]
        # jupyter_server's decorator keeps the action of its first call, so it must not stand on a shared method.
        if not await ensure_async(self.authorizer.is_authorized(self, user, action, self.auth_resource)):
            raise web.HTTPError(403, f"User is not authorized to {action} on resource: {self.auth_resource}.")
        return Caller(user.username, administers=self.service.scope(user.username) is None)

    def expect_lease(self, lease_id: str) -> None:
        pass  # no token's lease

    async def keep_lease(self, lease_id: str) -> None:
        pass

    def get_login_url(self) -> str:
        # An API answers 403; it never redirects a program to a login page.
        raise web.HTTPError(403, "this Jupyter server wants you to log in, or its token")

    def set_default_headers(self) -> None:
        APIHandler.set_default_headers(self)

    def check_xsrf_cookie(self) -> None:
        APIHandler.check_xsrf_cookie(self)


def in_jupyter(handler: type[BaseHandler]) -> type[BaseHandler]:
    """Return the handler under Jupyter Server's rules."""
    return type(f"{handler.__name__}InJupyter", (InJupyter, handler), {})


def jupyter_handlers(
    service: PoolBackend, events_in: type[EventsInJupyter] = EventsInJupyter
) -> list[tuple[Any, ...]]:
    """Return handlers for Jupyter Server, which adds its base URL."""
    events = (f"{PREFIX}/events", events_in, {"feed": Feed(service)})
    return [
        events,
        *((f"{PREFIX}{path}", in_jupyter(handler), {"service": service}) for path, handler, *_ in ROUTES),
    ]
