"""The calls about tokens, which only a pool that serves many users has."""

from __future__ import annotations

import time
from typing import Any

from tornado import web

from jupyter_gpupool.client.bundle import tar
from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Scope
from jupyter_gpupool.core.request_schema import check_types
from jupyter_gpupool.server.access.authentication import Authenticator
from jupyter_gpupool.server.access.token_service import Administration, shown
from jupyter_gpupool.server.service.backend import PoolBackend

from .base import BaseHandler, Route

#: The default lifetime of a token, in seconds.
DEFAULT_LIFE_S = 365 * 86400.0
_MAX_LIFE_S = 100 * 365 * 86400.0

_NEW: dict[str, tuple[type, ...]] = {
    "description": (str,),
    "owner": (str,),
    "namespace": (str,),
    "administers": (bool,),
    "expires_s": (int, float, type(None)),
    "scope": (str,),
    "one_namespace": (bool,),
}
_EXTENDED = {"expires_s": _NEW["expires_s"]}


class _AdministrationHandler(BaseHandler):
    """For administrators."""

    administrators_only = True
    changes_need = Scope.ADMINISTER

    def initialize(  # type: ignore[override]  # takes one more argument of the route
        self, service: PoolBackend, authenticator: Authenticator, administration: Administration
    ) -> None:
        super().initialize(service, authenticator)
        self.administration = administration

    def life(self, body: dict[str, Any]) -> float | None:
        """Return when a token with the body's lifetime expires; None for never. Raises InvalidRequest."""
        life: float | None = body.get("expires_s", DEFAULT_LIFE_S)
        if life is None:
            return None
        if not 0 < life <= _MAX_LIFE_S:
            raise InvalidRequest(
                "expires_s must be seconds above 0 and at most a hundred years, or null for never"
            )
        return time.time() + life


class TokensHandler(_AdministrationHandler):
    """``GET tokens`` lists the tokens; ``POST tokens`` creates one."""

    @web.authenticated
    async def get(self) -> None:
        now = time.time()
        self.reply({"tokens": [shown(token, now) for token in self.administration.tokens()]})

    @web.authenticated
    async def post(self) -> None:
        body = self.body()
        check_types(body, _NEW)
        if "description" not in body:
            raise InvalidRequest("description is missing: write whom, or what, this token is for")
        token, text, files = await self.administration.create(
            body["description"],
            body.get("owner", ""),
            body.get("namespace", "default"),
            body.get("administers", False),
            self.life(body),
            body.get("scope", Scope.ADMINISTER.value),
            body.get("one_namespace", False),
        )
        if "application/x-tar" in self.request.headers.get("Accept", ""):
            self.set_status(201)
            self.set_header("Content-Type", "application/x-tar")
            self.set_header("Content-Disposition", f'attachment; filename="gpupool-{token.id}.tar"')
            self.set_header("Cache-Control", "no-store")
            self.finish(tar(files))
            return
        answer = {**shown(token, time.time()), "token": text, "files": dict(files)}
        self.reply(answer, 201)


class TokenHandler(_AdministrationHandler):
    """``PATCH`` and ``DELETE tokens/ID``: extend and revoke a token."""

    @web.authenticated
    async def patch(self, token_id: str) -> None:
        body = self.body()
        check_types(body, _EXTENDED)
        token = await self.administration.extend(token_id, self.life(body))
        self.reply(shown(token, time.time()))

    @web.authenticated
    async def delete(self, token_id: str) -> None:
        token = await self.administration.revoke(token_id, self.flag("end_leases"))
        self.reply(shown(token, time.time()))


def token_routes(administration: Administration) -> list[Route]:
    """Return what :func:`~.handlers.standalone_handlers` takes as ``more``."""
    arguments = {"administration": administration}
    return [
        ("/tokens", TokensHandler, arguments),
        (r"/tokens/([0-9a-zA-Z-]{1,64})", TokenHandler, arguments),
    ]
