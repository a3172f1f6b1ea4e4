"""``GET login``: where people log in, whom no token names yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.server.access.oidc.issuers import Issuer

from .base import BaseHandler, Route


class LoginHandler(BaseHandler):
    """``GET login`` returns the identity providers, as a public client needs them. It takes no token.

    ``console``: those that one can sign in at in the Console.
    """

    def initialize(self, offered: dict[str, Any], **known: Any) -> None:  # type: ignore[override]
        super().initialize(**known)
        self.offered = offered

    async def prepare(self) -> None:
        """Let everybody read it: it says nothing of the pool and nothing secret."""

    async def get(self) -> None:
        self.reply(self.offered)


def login_routes(issuers: Sequence[Issuer]) -> list[Route]:
    """Return the route, which offers the issuers that have a client to log in with. Raises PoolError."""
    offered = [_offer(issuer) for issuer in issuers if issuer.client_id]
    console = [issuer.issuer for issuer in issuers if issuer.console_client_id]
    return [("/login", LoginHandler, {"offered": {"issuers": offered, "console": console}})]


def _offer(issuer: Issuer) -> dict[str, Any]:
    try:
        ca = Path(issuer.ca_file).read_text() if issuer.ca_file else ""
    except (OSError, UnicodeDecodeError) as e:
        raise PoolError(f"OIDC.issuers: a ca_file cannot be read ({e})") from None
    return {
        "issuer": issuer.issuer,
        "client_id": issuer.client_id,
        "scopes": issuer.login_scopes,
        "parameters": dict(issuer.login_parameters),
        "max_age_s": issuer.max_age_s,
        "ca": ca,
    }
