"""Authentication of the hub's service. The hub names a token's user; a name that a client sends is ignored."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tornado.web import HTTPError

from jupyter_gpupool.core.errors import PermissionDenied, PoolError, PoolUnreachable, Unauthenticated
from jupyter_gpupool.core.models import Request
from jupyter_gpupool.pool.tenancy.namespaces import DEFAULT
from jupyter_gpupool.server.access.authentication import Caller

USE, ADMINISTER = "custom:gpupool:use", "custom:gpupool:admin"
#: How long the hub's answer is valid, in seconds; and how long for existing leases while the hub does not answer.
FRESH_S = 10.0
STALE_S = 900.0
_MAX_CACHED_TOKENS = 10_000
_SERVER = re.compile(r"access:servers!server=(.*)/([^/]*)")
#: Precedes the server's mark, which this service writes at the end of a request's ``client``.
MARK = " hub-server:"


@dataclass(eq=False)
class Presented:
    """A token of the hub that somebody presented, while an event stream may depend on it.

    ``scope``: whose leases the stream tells of, see :class:`Caller`. ``trusted``: as for :meth:`HubTokens.of_model`.
    ``checked_at``: when the hub last said whether it ``counts``.
    """

    token: str = field(repr=False)
    scope: str | None
    trusted: bool = False
    checked_at: float = field(default_factory=time.monotonic)
    counts: bool = True
    asking: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class HubCaller(Caller):
    """A caller: one of a user's servers (``server`` is its name), a user (None), or the hub itself (``hub``)."""

    server: str | None = None
    hub: bool = False
    presented: Presented | None = None

    def admitted(self, request: Request) -> Request:
        """Return the request with its server's mark.

        Raises PermissionDenied for another namespace, and for a caller that is not a server.
        """
        if self.server is None:
            raise PermissionDenied("this hub lends GPUs only to servers; start one, and request GPUs there")
        return replace(super().admitted(request), client=marked(request.client, self.owner, self.server))


def mark(user: str, server: str) -> str:
    """Return the mark of a user's server."""
    return MARK + hashlib.sha256(f"{user}/{server}".encode()).hexdigest()[:20]


def marked(client: str, user: str, server: str) -> str:
    """Return ``client`` with that server's mark in place of any other."""
    return client.split(MARK)[0][:150] + mark(user, server)


class HubTokens:
    """An authenticator for the hub's tokens.

    ``who`` returns the hub's model of a token's user, None for an unknown token; it raises HTTPError if the hub does
    not answer. ``belongs`` is told which namespace each user belongs to, whenever the hub has said it.
    """

    def __init__(
        self,
        service_token: str,
        who: Callable[[str], Awaitable[Mapping[str, Any] | None]],
        namespaces: Mapping[str, str] | None,
        belongs: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._service_token = _digest(service_token)
        self._who = who
        self._namespaces = namespaces
        self._belongs = belongs
        self._known: OrderedDict[bytes, tuple[float, HubCaller | None]] = OrderedDict()

    async def authenticate(self, authorization: str, address: str) -> HubCaller:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() not in ("bearer", "token") or not token.strip() or not token.isascii():
            raise Unauthenticated("this pool requires a JupyterHub token: Authorization: Bearer <token>")
        shown = _digest(token.strip())
        if hmac.compare_digest(shown, self._service_token):
            return HubCaller("jupyterhub", administers=True, token="hub", hub=True)
        caller = await self._asked(shown, token.strip())
        if caller is None:
            raise Unauthenticated(
                "the hub does not accept this token, or its user may not use the GPU pool; get another at the hub"
            )
        return caller

    async def _asked(self, shown: bytes, token: str) -> HubCaller | None:
        now = time.monotonic()
        at, known = self._known.get(shown, (-STALE_S, None))
        if now - at < FRESH_S:
            return known
        try:
            model = await self._who(token)
        except HTTPError:
            if known is None or now - at > STALE_S:
                raise PoolUnreachable(
                    "the hub does not answer, so your token cannot be checked; try again in a minute"
                ) from None
            # The hub may be restarting: existing leases are kept.
            return replace(
                known,
                objection="the hub does not answer; try again in a minute",
            )
        caller = self.of_model(model) if model else None
        if caller is not None:
            await self.note(caller)
            caller = replace(caller, presented=Presented(token, caller.scope))
        self._known.pop(shown, None)
        self._known[shown] = now, caller
        if len(self._known) > _MAX_CACHED_TOKENS:
            self._known.popitem(last=False)
        return caller

    def of_model(self, model: Mapping[str, Any], trusted: bool = False) -> HubCaller | None:
        """Return the caller of a user model of the hub, or None if that user may not use the pool.

        ``trusted`` is for a person in a browser: an administrator of the hub then administers the pool, too. A
        program has only the scopes of its token.
        """
        scopes = set(model.get("scopes") or ())
        person = model.get("kind", "user") == "user"
        if not person or not ({USE, ADMINISTER} & scopes or (trusted and model.get("admin"))):
            return None
        servers = [m[2] for s in scopes if (m := _SERVER.fullmatch(s)) and m[1] == model["name"]]
        administers = (
            ADMINISTER in scopes or "admin:users" in scopes or (trusted and bool(model.get("admin")))
        )
        return HubCaller(
            model["name"],
            administers=administers,
            token=f"hub:{model['name']}",
            namespace=self.namespace(model.get("groups") or ()),
            server=servers[0] if len(servers) == 1 else None,
        )

    def namespace(self, groups: Sequence[str]) -> str:
        """Return the namespace of a user in those groups of the hub."""
        if self._namespaces is None:
            valid = [
                g for g in sorted(groups) if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", g)
            ]
            return valid[0] if valid else "default"
        return next((name for group, name in self._namespaces.items() if group in groups), "default")

    async def note(self, caller: HubCaller) -> None:
        """Tell which namespace a user belongs to now, as far as the ledger is there."""
        with contextlib.suppress(PoolError):
            await self._belongs(caller.owner, caller.namespace or DEFAULT)

    def is_still_valid(self, caller: Caller) -> bool:
        """Return what the hub last said of an event stream's token. It is asked again after :data:`FRESH_S`."""
        presented = caller.presented if isinstance(caller, HubCaller) else None
        if presented is None:
            return True
        if presented.asking is None and time.monotonic() - presented.checked_at >= FRESH_S:
            presented.asking = asyncio.get_running_loop().create_task(self._ask_again(presented))
        return presented.counts

    async def _ask_again(self, presented: Presented) -> None:
        try:
            model = await self._who(presented.token)
            caller = self.of_model(model, presented.trusted) if model else None
            presented.counts = caller is not None and caller.scope == presented.scope
            if not presented.counts:
                self._known.pop(_digest(presented.token), None)
            if caller is not None:
                await self.note(caller)
        except HTTPError:  # the hub may be restarting; a later message asks again
            pass
        finally:
            presented.checked_at, presented.asking = time.monotonic(), None

    def expect_lease(self, caller: Caller, lease_id: str) -> None:
        pass

    def record_lease(self, caller: Caller, lease_id: str) -> None:
        pass  # the request's mark names its server


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
