"""Who calls the hub's pool: whoever the hub says that a token is. Never a name that a client sends."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tornado.web import HTTPError

from ...api.auth import Caller
from ...pool.errors import NotAdmitted, NotAllowed, PoolUnreachable
from ...pool.models import Request

USE, ADMINISTER = "custom:gpupool:use", "custom:gpupool:admin"
#: How long the hub's word is taken, in seconds; and, while the hub does not answer, for what one has already.
FRESH_S = 10.0
STALE_S = 900.0
_MOST = 10_000
_SERVER = re.compile(r"access:servers!server=(.*)/([^/]*)")
#: What ends a request's ``client``: the server that it came from, as this service wrote it.
MARK = " hub-server:"


@dataclass(frozen=True)
class HubCaller(Caller):
    """``server``: the name of the caller's server, None if it is none. ``hub``: it is the hub itself."""

    server: str | None = None
    hub: bool = False

    def admitted(self, request: Request) -> Request:
        """Raises NotAllowed for another namespace's, and from where nobody has chosen what may be had."""
        if self.server is None:
            raise NotAllowed("GPUs are lent to servers of this hub; start one, and ask there")
        return replace(super().admitted(request), client=marked(request.client, self.owner, self.server))


def mark(user: str, server: str) -> str:
    return MARK + hashlib.sha256(f"{user}/{server}".encode()).hexdigest()[:20]


def marked(client: str, user: str, server: str) -> str:
    """``client`` with that server's mark, and no other's."""
    return client.split(MARK)[0][:150] + mark(user, server)


class HubTokens:
    """A doorkeeper. ``who``: the hub's model of the user whose token it is, None for nobody's; raises HTTPError."""

    def __init__(
        self,
        service_token: str,
        who: Callable[[str], Awaitable[Mapping[str, Any] | None]],
        namespaces: Mapping[str, str] | None,
    ) -> None:
        self._service_token = hashlib.sha256(service_token.encode()).digest()
        self._who = who
        self._namespaces = namespaces
        self._known: OrderedDict[bytes, tuple[float, HubCaller | None]] = OrderedDict()

    async def caller(self, authorization: str, address: str) -> HubCaller:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() not in ("bearer", "token") or not token.strip() or not token.isascii():
            raise NotAdmitted("this pool wants a token of its JupyterHub: Authorization: Bearer <token>")
        shown = hashlib.sha256(token.strip().encode()).digest()
        if hmac.compare_digest(shown, self._service_token):
            return HubCaller("jupyterhub", administers=True, token="hub", hub=True)
        caller = await self._asked(shown, token.strip())
        if caller is None:
            raise NotAdmitted("the hub does not know that token, or it may not use the GPU pool")
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
                raise PoolUnreachable("the hub cannot be asked who this is; try again in a minute") from None
            # Restarting, perhaps: who holds something keeps it.
            return replace(known, objection="the hub cannot be asked whether you may; try again in a minute")
        caller = self.of_model(model) if model else None
        self._known.pop(shown, None)
        self._known[shown] = now, caller
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return caller

    def of_model(self, model: Mapping[str, Any], trusted: bool = False) -> HubCaller | None:
        """``trusted``: a person in a browser, not a program that was given a right or two: who administers the
        hub administers the pool there."""
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
        """Of whoever is in those groups of the hub."""
        if self._namespaces is None:
            valid = [
                g for g in sorted(groups) if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", g)
            ]
            return valid[0] if valid else "default"
        return next((name for group, name in self._namespaces.items() if group in groups), "default")

    def still(self, caller: Caller) -> bool:
        return True  # a socket asks again when it is opened again

    def expects(self, caller: Caller, lease_id: str) -> None:
        pass

    def note(self, caller: Caller, lease_id: str) -> None:
        pass  # the request itself says which server it came from
