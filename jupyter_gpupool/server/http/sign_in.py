"""Signing in to the Console: to an issuer's login page, back with a code, and the session that follows."""

from __future__ import annotations

import html
import secrets
from collections.abc import Callable
from typing import Any

from tornado import web
from tornado.httputil import HTTPServerRequest

from jupyter_gpupool.client.identity_provider import CodeRequest
from jupyter_gpupool.core.errors import InvalidRequest, PoolError, Unauthenticated
from jupyter_gpupool.server.access.oidc.browser_sessions import COOKIE, ConsoleSessions
from jupyter_gpupool.server.access.oidc.issuers import place

from .base import BaseHandler, Route
from .console import CONSOLE

SIGN_IN, SIGNED_IN = "/gpupool/sign-in", "/gpupool/signed-in"

#: What the browser keeps while its user is at the issuer: which one, the state, and PKCE's verifier.
_UNDER_WAY = "__Host-gpupool-sign-in"
#: How long that may take, in seconds.
_UNDER_WAY_S = 600
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class _Page(web.RequestHandler):
    """What a browser navigates to; a refusal is a page for people."""

    def initialize(self, sessions: ConsoleSessions, address: Callable[[HTTPServerRequest], str]) -> None:
        self.sessions = sessions
        self.address = address

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Content-Security-Policy", _POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")

    def keep(self, name: str, value: str, same_site: str, max_age_s: int) -> None:
        """Set a cookie that only this host gets, only by TLS, and that no script reads."""
        self.set_cookie(
            name, value, path="/", secure=True, httponly=True, samesite=same_site, max_age=max_age_s
        )

    def redirect_uri(self, issuer: str) -> str:
        return f"{self.address(self.request)}{SIGNED_IN}/{place(issuer)}"

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        said = str(error) if isinstance(error, PoolError) else self._reason
        self.set_status(error.status if isinstance(error, PoolError) else status_code)
        self.finish(
            f"<!doctype html><title>GPU pool</title><h1>You are not signed in</h1><p>{html.escape(said)}</p>"
            f'<p><a href="{CONSOLE}/">Back to the Console</a></p>'
        )

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        if not isinstance(value, PoolError):
            super().log_exception(kind, value, trace)


class SignIn(_Page):
    """Sends the browser to the login page of the issuer that the query names, or of the only one."""

    async def get(self) -> None:
        issuer = self.get_query_argument("issuer", (self.sessions.offered or [""])[0])
        asked = CodeRequest.new()
        page = await self.sessions.login_page(issuer, self.redirect_uri(issuer), asked)
        # Lax, for it has to come along when the issuer sends the browser back.
        self.keep(_UNDER_WAY, f"{asked.state}.{asked.verifier}.{issuer.encode().hex()}", "Lax", _UNDER_WAY_S)
        self.redirect(page)


class SignedIn(_Page):
    """Where the issuer of that place sends the browser back with a code."""

    async def get(self, where: str) -> None:
        state, verifier, issuer = (self.get_cookie(_UNDER_WAY, "").split(".") + ["", ""])[:3]
        self.clear_cookie(_UNDER_WAY, path="/", secure=True, httponly=True)
        answer = {
            name: values[-1].decode(errors="replace") for name, values in self.request.arguments.items()
        }
        if not state or not secrets.compare_digest(answer.get("state", "").encode(), state.encode()):
            raise Unauthenticated("this is not the answer to a sign-in of this browser; sign in again")
        try:
            named = bytes.fromhex(issuer).decode()
        except ValueError:
            raise InvalidRequest("the sign-in's cookie is damaged; sign in again") from None
        if where != place(named):
            raise Unauthenticated("another identity provider answered than was asked; sign in again")
        cookie = await self.sessions.begin(
            named,
            answer,
            self.redirect_uri(named),
            CodeRequest(state, verifier),
            self.request.remote_ip or "unknown",
        )
        # Strict: it comes along with what the Console's page asks for, and with nothing that another site begins.
        self.keep(COOKIE, cookie, "Strict", int(self.sessions.longest_s))
        self.redirect(f"{CONSOLE}/")


class SessionHandler(BaseHandler):
    """``GET session`` tells the Console's page what its calls have to carry; ``DELETE session`` signs out."""

    def initialize(self, sessions: ConsoleSessions, **known: Any) -> None:  # type: ignore[override]
        super().initialize(**known)
        self.sessions = sessions

    async def prepare(self) -> None:
        """The cookie is the only identity here."""

    async def get(self) -> None:
        self.reply({"csrf": self.sessions.secret(self.request)})

    async def delete(self) -> None:
        ended = await self.sessions.end(self.request, self.flag("everywhere"))
        self.clear_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="Strict")
        self.reply({"ended": ended})


def session_routes(sessions: ConsoleSessions) -> list[Route]:
    """Return the routes of the HTTP interface."""
    return [("/session", SessionHandler, {"sessions": sessions})]


def sign_in_handlers(
    sessions: ConsoleSessions, address: Callable[[HTTPServerRequest], str]
) -> list[tuple[Any, ...]]:
    """Return handlers for the pages. ``address`` returns this server's for a request, ``https://NAME:PORT``."""
    arguments = {"sessions": sessions, "address": address}
    return [(SIGN_IN, SignIn, arguments), (rf"{SIGNED_IN}/([a-z0-9-]+)", SignedIn, arguments)]
