"""Sign-ins of the Console: the browser has a cookie that means nothing elsewhere, and the tokens stay in this process.

A session's calls carry a second secret besides the cookie, which pages of other sites cannot read: that is what
protects against requests that they have a browser make.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tornado.httputil import HTTPServerRequest

from jupyter_gpupool.client.identity_provider import CodeRequest, Denied, IdentityProvider, login_page
from jupyter_gpupool.core.errors import IssuerUnavailable, NotSupported, PoolError, Unauthenticated
from jupyter_gpupool.server.access.authentication import (
    Authenticator,
    Caller,
    digest,
    in_subprotocol,
)

from .issuers import Issuer

#: The cookie of a session. Its prefix has browsers refuse it from another host, or without TLS.
COOKIE = "__Host-gpupool"
#: Where a session's calls carry its second secret: in this header, or in a subprotocol of a WebSocket.
CSRF_HEADER, CSRF_PROTOCOL = "X-GPUPool-CSRF", "gpupool.csrf."

#: The most sessions, and the most of one user; beyond that the oldest ends.
_MAX_SESSIONS, _MAX_OF_A_USER = 10_000, 20
#: The share of a token's longest age at which it is refreshed.
_EARLY = 0.75
#: How long an issuer's description of itself is used, and when one that does not answer is asked again, in seconds.
_DESCRIPTION_S = 300.0
_AGAIN_S = 5.0
#: The threads that ask issuers, for strangers and for those who are signed in, and the most strangers that wait.
_THREADS = 4
_MAX_WAITING = 64

_T = TypeVar("_T")


@dataclass
class _Session:
    issuer: Issuer
    owner: str
    csrf: str
    ends_at: float
    access_token: str = ""
    refresh_token: str = ""
    refresh_at: float = 0.0
    refreshing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def use(self, tokens: Mapping[str, Any], now: float) -> None:
        """Take over what the issuer's token endpoint has answered. Raises Denied."""
        try:
            access_token, life_s = tokens["access_token"], float(tokens.get("expires_in", 3600))
        except (KeyError, TypeError, ValueError):
            raise Denied(f"{self.issuer.issuer} answered without an access token", "") from None
        longest_s = self.issuer.max_age_s
        self.access_token = str(access_token)
        self.refresh_token = str(tokens.get("refresh_token") or self.refresh_token)
        self.refresh_at = now + min(life_s - 10.0, life_s if longest_s is None else longest_s * _EARLY)


class ConsoleSessions:
    """The sessions of browsers that signed in at one of the issuers that have a client for the Console.

    They live as long as this process: after a restart one signs in again, mostly without being asked for anything.
    Raises PoolError for a file of an issuer that cannot be read.
    """

    def __init__(
        self,
        issuers: Sequence[Issuer],
        authenticator: Authenticator,
        longest_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._issuers = {one.issuer: one for one in issuers if one.console_client_id}
        self._authenticator = authenticator
        self.longest_s = longest_s
        self._clock = clock
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # by the digest of the cookie
        self._described: dict[str, tuple[float, dict[str, Any] | IssuerUnavailable]] = {}
        self._describing = {one.issuer: asyncio.Lock() for one in self._issuers.values()}
        # Threads of their own: nobody who only opens a page holds up what else this process does in threads, nor
        # those who are signed in.
        self._for_strangers = ThreadPoolExecutor(_THREADS, "sign-in")
        self._for_sessions = ThreadPoolExecutor(_THREADS, "sign-in-refresh")
        self._waiting = 0
        self._secrets = {one.issuer: _read(one.console_secret_file) for one in self._issuers.values()}
        self._authorities = {one.issuer: _read(one.ca_file) for one in self._issuers.values()}

    @property
    def offered(self) -> list[str]:
        """The issuers that one can sign in at."""
        return list(self._issuers)

    # -- signing in

    async def login_page(self, issuer: str, redirect_uri: str, asked: CodeRequest) -> str:
        """Return the address of the issuer's login page. Raises NotSupported and IssuerUnavailable."""
        one = self._issuers.get(issuer)
        if one is None:
            raise NotSupported("the Console has no such identity provider to sign in at")
        endpoints = await self._description(one)
        return login_page(
            endpoints,
            one.console_client_id,
            one.login_scopes,
            redirect_uri,
            asked,
            one.login_parameters,
        )

    async def begin(
        self, issuer: str, answer: Mapping[str, str], redirect_uri: str, asked: CodeRequest, address: str
    ) -> str:
        """Begin a session by an issuer's answer, whose state the caller has compared; return its cookie.

        Raises Denied, Unauthenticated, NotSupported and IssuerUnavailable.
        """
        one = self._issuers.get(issuer)
        if one is None:
            raise NotSupported("the Console has no such identity provider to sign in at")
        endpoints = await self._description(one)
        now = self._clock()
        tokens = await self._with(one, lambda at: at.redeem(endpoints, answer, redirect_uri, asked))
        session = _Session(one, "", secrets.token_urlsafe(32), now + self.longest_s)
        session.use(tokens, now)
        session.owner = (await self._caller(session, address)).owner
        cookie = secrets.token_urlsafe(32)
        self._sessions[digest(cookie)] = session
        self._make_room(session.owner)
        return cookie

    async def _caller(self, session: _Session, address: str) -> Caller:
        found = self._authenticator.authenticate(f"Bearer {session.access_token}", address)
        caller = await found if isinstance(found, Awaitable) else found
        if caller.objection:
            raise Unauthenticated(caller.objection)
        return caller

    def _make_room(self, owner: str) -> None:
        now = self._clock()
        theirs = [key for key, one in self._sessions.items() if one.owner == owner]
        ended = [key for key, one in self._sessions.items() if one.ends_at <= now]
        for key in {*ended, *theirs[:-_MAX_OF_A_USER], *list(self._sessions)[:-_MAX_SESSIONS]}:
            del self._sessions[key]

    # -- calls

    async def authorization(self, request: HTTPServerRequest) -> str:
        """Return the header with a session's token, refreshed where it is due. Raises Unauthenticated."""
        cookie = _cookie(request)
        if not cookie:
            return ""
        session = self._find(cookie)
        shown = request.headers.get(CSRF_HEADER, "") or in_subprotocol(request, CSRF_PROTOCOL)
        if not secrets.compare_digest(shown.encode(), session.csrf.encode()):
            raise Unauthenticated(f"a call with the Console's cookie needs the header {CSRF_HEADER}")
        if self._clock() >= session.refresh_at:
            await self._refresh(digest(cookie), session)
        return f"Bearer {session.access_token}"

    async def _refresh(self, key: str, session: _Session) -> None:
        async with session.refreshing:
            now = self._clock()
            if now < session.refresh_at or not session.refresh_token:
                return  # without a refresh token it lasts as long as its access token
            try:
                endpoints = await self._description(session.issuer)
                tokens = await self._with(
                    session.issuer,
                    lambda at: at.refresh(endpoints["token_endpoint"], session.refresh_token),
                    is_known=True,
                )
                session.use(tokens, now)
            except IssuerUnavailable:
                session.refresh_at = (
                    self._clock() + _AGAIN_S
                )  # the pool keeps what runs, and says what is the matter
            except Denied as e:
                self._sessions.pop(key, None)
                raise Unauthenticated(f"your sign-in has ended ({e}); sign in again") from None

    def is_open(self, request: HTTPServerRequest) -> bool:
        """Return whether the session of a request has not ended; True for a request without one."""
        cookie = _cookie(request)
        session = self._sessions.get(digest(cookie)) if cookie else None
        return not cookie or (session is not None and self._clock() < session.ends_at)

    def secret(self, request: HTTPServerRequest) -> str:
        """Return what the calls of a request's session have to carry. Raises Unauthenticated."""
        return self._find(_cookie(request)).csrf

    def _find(self, cookie: str) -> _Session:
        session = self._sessions.get(digest(cookie)) if cookie else None
        if session is None or self._clock() >= session.ends_at:
            raise Unauthenticated("you are not signed in, or your sign-in has ended; sign in again")
        return session

    # -- signing out

    async def end(self, request: HTTPServerRequest, everywhere: bool) -> int:
        """End the session of a request, or all of its user's; return how many. Raises Unauthenticated.

        Their refresh tokens are made worthless at the issuer, where it answers.
        """
        await self.authorization(request)
        session = self._find(_cookie(request))
        ended = {
            key: one
            for key, one in self._sessions.items()
            if one is session or (everywhere and one.owner == session.owner)
        }
        for key in ended:
            del self._sessions[key]
        await asyncio.gather(*(self._revoke(one) for one in ended.values()))
        return len(ended)

    async def _revoke(self, session: _Session) -> None:
        try:
            endpoint = (await self._description(session.issuer)).get("revocation_endpoint")
            if endpoint and session.refresh_token:
                await self._with(
                    session.issuer, lambda at: at.revoke(endpoint, session.refresh_token), is_known=True
                )
        except (Denied, IssuerUnavailable):
            pass  # it is forgotten here, and nobody else has it

    # -- the issuer

    async def _description(self, issuer: Issuer) -> dict[str, Any]:
        """Return what an issuer says of itself, or of late did not. Raises IssuerUnavailable."""
        async with self._describing[issuer.issuer]:
            now = self._clock()
            at, found = self._described.get(issuer.issuer, (0.0, {}))
            if not found or not 0 <= now - at < (_DESCRIPTION_S if isinstance(found, dict) else _AGAIN_S):
                try:
                    found = await self._with(issuer, lambda provider: provider.discover(), is_known=True)
                except IssuerUnavailable as e:
                    found = e
                self._described[issuer.issuer] = self._clock(), found
        if isinstance(found, IssuerUnavailable):
            raise IssuerUnavailable(str(found))
        return found

    async def _with(
        self, issuer: Issuer, call: Callable[[IdentityProvider], _T], is_known: bool = False
    ) -> _T:
        run = asyncio.get_running_loop().run_in_executor
        if is_known:
            return await run(self._for_sessions, partial(self._now, issuer, call))
        if self._waiting >= _MAX_WAITING:
            raise IssuerUnavailable("too many people sign in at once; try again in a moment")
        self._waiting += 1
        try:
            return await run(self._for_strangers, partial(self._now, issuer, call))
        finally:
            self._waiting -= 1

    def _now(self, issuer: Issuer, call: Callable[[IdentityProvider], _T]) -> _T:
        with IdentityProvider(
            issuer.issuer,
            issuer.console_client_id,
            self._authorities[issuer.issuer],
            issuer.login_parameters,
            self._secrets[issuer.issuer],
        ) as provider:
            return call(provider)


def _cookie(request: HTTPServerRequest) -> str:
    found = request.cookies.get(COOKIE)
    return found.value if found is not None else ""


def _read(file: str) -> str:
    try:
        return Path(file).read_text().strip() if file else ""
    except (OSError, UnicodeDecodeError) as e:
        raise PoolError(
            f"OIDC.issuers: {file} cannot be read ({getattr(e, 'strerror', None) or e})"
        ) from None
