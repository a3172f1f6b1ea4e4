"""The base class of every call of the pool's HTTP interface, whichever server answers it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from tornado import web

from jupyter_gpupool.core.errors import (
    InvalidRequest,
    PermissionDenied,
    PoolError,
    TooManyRequests,
    Unauthenticated,
)
from jupyter_gpupool.core.models import Request, Scope
from jupyter_gpupool.core.request_schema import check_types, types
from jupyter_gpupool.pool.tenancy.audit_log import acting
from jupyter_gpupool.pool.tenancy.namespaces import DEFAULT
from jupyter_gpupool.server.access.authentication import Authenticator, Caller, who_calls
from jupyter_gpupool.server.access.open_calls import OpenCallLimits
from jupyter_gpupool.server.access.rates import RateLimits, kind_of
from jupyter_gpupool.server.service.backend import PoolBackend

MAX_BODY = 64 * 1024
MAX_WAIT_S = 30.0

#: Path, handler, and what its ``initialize`` takes besides the pool and the authenticator.
Route: TypeAlias = "tuple[str, type[BaseHandler]] | tuple[str, type[BaseHandler], dict[str, Any]]"


class BaseHandler(web.RequestHandler):
    """A call of the pool's HTTP interface.

    :meth:`prepare` finds out who calls before any verb runs: by a token here, and otherwise in the subclasses for
    Jupyter Server and for the hub, which override :meth:`authenticate`.
    """

    service: PoolBackend
    caller: Caller
    #: The methods that a token may still use after it has expired or was revoked, for the leases it requested before.
    last_rights: Sequence[str] = ()
    administrators_only = False
    #: The scope that a token needs for the methods that change something.
    changes_need = Scope.LEASE
    #: The name of the PoolError by which the call was refused.
    refusal = ""

    def initialize(self, service: PoolBackend, authenticator: Authenticator) -> None:
        self.service = service
        self.authenticator = authenticator

    async def prepare(self) -> None:
        self.caller = await self.authenticate()
        acting.set(self.service.named(self.caller.owner))

    async def authenticate(self) -> Caller:
        """Return who calls, and set ``current_user``. Raises Unauthenticated and PermissionDenied."""
        caller = await who_calls(self.authenticator, self.request, self.settings.get("sessions"))
        if caller.objection:
            if self.request.method not in self.last_rights:
                raise Unauthenticated(caller.objection)
            caller = replace(caller, administers=False)
        caller = caller.permitted(str(self.request.method), self.changes_need)
        if self.administrators_only and not caller.administers:
            raise PermissionDenied(
                "this requires an administrator token; ask the person who issued yours for one"
            )
        self.settings.get("admitted", lambda request: None)(self.request)
        self.count_call(caller)
        self.current_user = caller
        return caller

    def count_call(self, caller: Caller) -> None:
        """Count the call where callers are limited, and tell what is left. Raises TooManyRequests."""
        limits: RateLimits | None = self.settings.get("rate_limits")
        if limits is None:
            return
        left = limits.admit(caller, kind_of(str(self.request.method), self.last_rights))
        if left is not None:
            for name, value in left.headers():
                self.set_header(name, value)

    def waiting(self, wait_s: float) -> contextlib.AbstractContextManager[None]:
        """Count the call among the open ones while it waits, where these are limited. Raises TooManyRequests."""
        limits: OpenCallLimits | None = self.settings.get("open_calls")
        return contextlib.nullcontext() if limits is None else limits.waiting(self.caller, wait_s)

    def set_default_headers(self) -> None:
        self.clear_header("Server")  # a caller who is not authenticated need not learn what runs here
        self.set_header("X-Content-Type-Options", "nosniff")

    def check_xsrf_cookie(self) -> None:
        pass  # another site can send neither a token nor what a session's calls have to carry

    def owner(self) -> str:
        """Return the name whose leases these are."""
        return self.caller.owner

    def scope(self) -> str | None:
        """Return whose leases the caller may see and release: a name, or None for everybody's."""
        return self.caller.scope

    def mine(self) -> str | None:
        """Return the scope of the caller's own leases."""
        return self.caller.owner if self.caller.token else self.scope()

    def namespace(self) -> str:
        """Return the namespace that the caller belongs to."""
        return self.caller.namespace or DEFAULT

    async def check_request(self, request: Request) -> Request:
        """Return the request as the caller may make it. Raises PermissionDenied."""
        request = self.caller.admitted(request)
        await self.service.tenants.check_use(self.scope(), request.namespace, request.id)
        return request

    async def check_lease(self, lease_id: str) -> None:
        """Raise PermissionDenied for a change of a lease outside of the only namespace of the caller's token."""
        if self.caller.one_namespace:
            lease = await self.service.wait(lease_id, self.scope(), 0.0)
            self.caller.check_within(lease.request.namespace)

    def expect_lease(self, lease_id: str) -> None:
        """Note that the caller asks for a lease of that id."""
        self.authenticator.expect_lease(self.caller, lease_id)

    async def keep_lease(self, lease_id: str) -> None:
        """Note that the caller still wants this lease.

        Raises Unauthenticated, and releases the lease, where the caller's token was revoked together with its leases.
        """
        if self.caller.cut:
            await self.service.release(lease_id, self.scope(), "its token was revoked")
            raise Unauthenticated(self.caller.objection)
        self.authenticator.record_lease(self.caller, lease_id)

    def reply(self, value: Any, status: int = 200) -> None:
        """Finish the response with a value as JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, PoolError):
            self.refusal = type(error).__name__
            if isinstance(error, TooManyRequests):
                self.set_header("Retry-After", str(math.ceil(error.retry_after_s)))
            self.reply({"error": type(error).__name__, "message": str(error)}, error.status)
            return
        reason = getattr(error, "log_message", None) or getattr(error, "reason", None) or self._reason
        self.reply({"error": type(error).__name__ if error else "Error", "message": str(reason)}, status_code)

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        if not isinstance(value, PoolError):
            super().log_exception(kind, value, trace)

    def seconds(self, name: str) -> float:
        """Return a query argument in seconds, at most :data:`MAX_WAIT_S`. Raises InvalidRequest."""
        text = self.get_query_argument(name, "0")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not value >= 0:
            raise InvalidRequest(f"{name}={text[:40]}: give seconds from 0 up")
        return min(value, MAX_WAIT_S)

    def number(self, name: str) -> float | None:
        """Return a query argument that is a finite number; None without it. Raises InvalidRequest."""
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
        """Return whether a query argument is 1 or true."""
        return self.get_query_argument(name, "0") in ("1", "true")

    def body(self) -> dict[str, Any]:
        """Return the body, a JSON object. Raises InvalidRequest."""
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
    """Return the request that a body describes; ``owner`` never comes from it. Raises InvalidRequest."""
    check_types(body, types())
    filters = body.get("filters", {})
    if not all(isinstance(v, str) for v in filters.values()):
        raise InvalidRequest("filters maps names to text")
    if "id" not in body:
        raise InvalidRequest("id is missing: choose a uuid, so that the request can be repeated safely")
    return Request(**{**body, "owner": owner})
