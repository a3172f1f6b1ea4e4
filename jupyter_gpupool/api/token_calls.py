"""The calls about tokens, which a pool has that serves many."""

from __future__ import annotations

import time
from typing import Any

from ..pool.errors import InvalidRequest
from .administration import Administration, shown
from .bundle import tar
from .handlers import Calls, check_types

#: How long a token lives unless its creator says so, in seconds.
DEFAULT_LIFE_S = 365 * 86400.0
_LONGEST_S = 100 * 365 * 86400.0

_NEW: dict[str, tuple[type, ...]] = {
    "description": (str,),
    "owner": (str,),
    "namespace": (str,),
    "administers": (bool,),
    "expires_s": (int, float, type(None)),
}
_EXTENDED = {"expires_s": _NEW["expires_s"]}


class _TokenCalls(Calls):
    """For administrators."""

    administration: Administration
    administrators_only = True

    def life(self, body: dict[str, Any]) -> float | None:
        """When a token of that life ends; None for never."""
        life = body.get("expires_s", DEFAULT_LIFE_S)
        if life is None:
            return None
        if not 0 < life <= _LONGEST_S:
            raise InvalidRequest(
                "expires_s must be seconds above 0 and at most a hundred years, or null for never"
            )
        return time.time() + life


class TokensCall(_TokenCalls):
    async def read(self) -> None:
        now = time.time()
        self.reply({"tokens": [shown(token, now) for token in self.administration.tokens()]})

    async def create(self) -> None:
        body = self.body()
        check_types(body, _NEW)
        if "description" not in body:
            raise InvalidRequest("description is missing: whom, or what, is this token for?")
        token, text, files = await self.administration.create(
            body["description"],
            body.get("owner", ""),
            body.get("namespace", "default"),
            body.get("administers", False),
            self.life(body),
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


class TokenCall(_TokenCalls):
    async def change(self, token_id: str) -> None:
        body = self.body()
        check_types(body, _EXTENDED)
        token = await self.administration.extend(token_id, self.life(body))
        self.reply(shown(token, time.time()))

    async def remove(self, token_id: str) -> None:
        token = await self.administration.revoke(token_id, self.flag("end_leases"))
        self.reply(shown(token, time.time()))


def token_routes(administration: Administration) -> list[tuple[str, type[Calls]]]:
    """For :func:`~.handlers.standalone_handlers`."""
    return [
        ("/tokens", _bound(TokensCall, administration)),
        (r"/tokens/([0-9a-zA-Z-]{1,64})", _bound(TokenCall, administration)),
    ]


def _bound(call: type[_TokenCalls], administration: Administration) -> type[Calls]:
    return type(call.__name__, (call,), {"administration": administration})
