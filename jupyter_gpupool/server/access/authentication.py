"""Authenticates callers by their tokens, and limits guesses."""

from __future__ import annotations

import getpass
import hashlib
import hmac
import inspect
import time
from collections import OrderedDict
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Protocol

from tornado.httputil import HTTPServerRequest

from jupyter_gpupool.core.addresses import network
from jupyter_gpupool.core.errors import PermissionDenied, PoolError, TooManyAttempts, Unauthenticated
from jupyter_gpupool.core.models import Request, Scope
from jupyter_gpupool.pool.tenancy.tokens import Token, Tokens

#: After so many wrong tokens from one address within so many seconds, further ones are refused until these are over.
_MAX_ATTEMPTS = 10
_ATTEMPT_WINDOW_S = 60.0
_MAX_ADDRESSES = 10_000


#: The subprotocol of a page's WebSocket, and the prefix of the subprotocol that carries its token.
PROTOCOL, TOKEN_PROTOCOL = "gpupool", "gpupool.token."


#: The methods of calls that change nothing.
READS = frozenset(("GET", "HEAD", "OPTIONS"))
_RANK = {scope: rank for rank, scope in enumerate(Scope)}


@dataclass(frozen=True)
class Caller:
    """An authenticated caller. An administrator sees everybody's leases.

    ``objection``: why the token is no longer valid. It may still renew and release the leases that it requested.
    ``cut``: the token was revoked together with its leases.
    ``may``: the most that the caller may do now. ``one_namespace``: nothing is changed in another one.
    """

    owner: str
    administers: bool
    token: str = ""
    namespace: str | None = None
    objection: str = ""
    cut: bool = False
    may: Scope = Scope.ADMINISTER
    one_namespace: bool = False

    @property
    def scope(self) -> str | None:
        return None if self.administers else self.owner

    def admitted(self, request: Request) -> Request:
        """Return the request in the caller's namespace. Raises PermissionDenied for another namespace."""
        if self.namespace is None or self.administers:
            return request
        if request.namespace not in ("default", self.namespace):
            raise PermissionDenied(
                f"this token is of the namespace {self.namespace!r}, not {request.namespace!r}; "
                f"ask the pool's administrator for a token of that one"
            )
        return replace(request, namespace=self.namespace)

    def permitted(self, method: str, changes_need: Scope) -> Caller:
        """Return the caller as who makes the call: without an administrator's rights where its token has none.

        ``changes_need``: the scope that the call needs where it changes something. Raises PermissionDenied.
        """
        if method in READS:
            return self
        if _RANK[self.may] < _RANK[changes_need]:
            raise PermissionDenied(
                f"this token's scope is {self.may.value}, and the call needs {changes_need.value}; ask the pool's "
                f"administrator for a token of that scope"
            )
        return self if self.may is Scope.ADMINISTER else replace(self, administers=False)

    def check_within(self, namespace: str) -> None:
        """Raise PermissionDenied unless the caller may change what is in that namespace."""
        if self.one_namespace and namespace != self.namespace:
            raise PermissionDenied(
                f"this token changes nothing outside of the namespace {self.namespace!r}; ask the pool's "
                f"administrator for another token"
            )


class Authenticator(Protocol):
    """Authenticates callers by their tokens."""

    def authenticate(self, authorization: str, address: str) -> Caller | Awaitable[Caller]:
        """Return the caller that an ``Authorization`` header proves; awaitable where another service has to be asked.

        Raises Unauthenticated and TooManyAttempts.
        """

    def is_still_valid(self, caller: Caller) -> bool:
        """Return whether a caller who was authenticated before still would be."""

    def expect_lease(self, caller: Caller, lease_id: str) -> None:
        """Note that the caller requests a lease of that id, which may turn out to be somebody else's."""

    def record_lease(self, caller: Caller, lease_id: str) -> None:
        """Note that the lease is the caller's."""


class BrowserSessions(Protocol):
    """Those who have signed in in a browser, which has a cookie and never their token."""

    async def authorization(self, request: HTTPServerRequest) -> str:
        """Return the ``Authorization`` header for a request with a session's cookie; empty for one without it.

        Raises Unauthenticated where the session has ended, or the request may come from a page of another site.
        """

    def is_open(self, request: HTTPServerRequest) -> bool:
        """Return whether the session of a request has not ended; True for a request without one."""


async def who_calls(
    tokens: Authenticator, request: HTTPServerRequest, sessions: BrowserSessions | None = None
) -> Caller:
    """Return who made an HTTP request. Raises what :meth:`Authenticator.authenticate` raises."""
    authorization = request.headers.get("Authorization", "") or _by_subprotocol(request)
    if not authorization and sessions is not None:
        authorization = await sessions.authorization(request)
    caller = tokens.authenticate(authorization, request.remote_ip or "unknown")
    return await caller if inspect.isawaitable(caller) else caller


def _by_subprotocol(request: HTTPServerRequest) -> str:
    shown = in_subprotocol(request, TOKEN_PROTOCOL)
    return f"Bearer {shown}" if shown else ""


def in_subprotocol(request: HTTPServerRequest, prefix: str) -> str:
    """Return what came as a subprotocol after ``prefix``, or nothing: a page's WebSocket can set no other header."""
    offered = request.headers.get("Sec-WebSocket-Protocol", "").replace(" ", "").split(",")
    shown = [word[len(prefix) :] for word in offered if word.startswith(prefix)]
    return shown[0] if len(shown) == 1 else ""


def digest(token: str) -> str:
    """Return the SHA-256 of a token, in hexadecimal digits."""
    return hashlib.sha256(token.encode()).hexdigest()


def token_in(authorization: str) -> str:
    """Return the token of an ``Authorization`` header. Raises Unauthenticated."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() not in ("bearer", "token") or not token.strip():
        raise Unauthenticated("this pool requires its token: send Authorization: Bearer <token>")
    return token.strip()


class TokenStore:
    """A few tokens, all of the user who runs this pool. Only their hashes are kept."""

    def __init__(self, *tokens: str) -> None:
        self._digests = [digest(token) for token in tokens]
        self._user = getpass.getuser()

    def admits(self, authorization: str) -> bool:
        """Return whether an ``Authorization`` header carries a known token, in the same time for any wrong one."""
        try:
            shown = digest(token_in(authorization))
        except PoolError:
            return False
        admitted = False
        for known in self._digests:
            admitted |= hmac.compare_digest(shown, known)
        return admitted

    def authenticate(self, authorization: str, address: str) -> Caller:
        if not self.admits(authorization):
            raise Unauthenticated("this pool requires its token: send Authorization: Bearer <token>")
        return Caller(self._user, administers=True)

    def is_still_valid(self, caller: Caller) -> bool:
        return True

    def expect_lease(self, caller: Caller, lease_id: str) -> None:
        pass

    def record_lease(self, caller: Caller, lease_id: str) -> None:
        pass  # these tokens are never revoked


class LedgerTokens:
    """The tokens of a pool that serves many users. Limits guesses by address."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.used: dict[str, float] = {}  # token id → when it was last used, until that is recorded
        self.asked: dict[str, str] = {}  # lease → the token that requested it, or last renewed it
        self._throttle = Throttle()

    def authenticate(self, authorization: str, address: str) -> Caller:
        shown = token_in(authorization)
        named = self.tokens.named(shown)
        # A client that guesses must not lock out others behind its address who know their token.
        key = f"{network(address)} {named.id if named else ''}"
        self._throttle.check(key)
        token = self.tokens.proven(shown)
        if token is None:
            self._throttle.failed(key)
            raise Unauthenticated(
                "this pool does not know that token; check client.yaml, or ask the pool's administrator "
                "for a new one"
            )
        now = time.time()
        self.used[token.id] = now
        return _caller(token, now)

    def record_lease(self, caller: Caller, lease_id: str) -> None:
        self.asked[lease_id] = caller.token

    def expect_lease(self, caller: Caller, lease_id: str) -> None:
        self.asked.setdefault(lease_id, caller.token)

    def is_still_valid(self, caller: Caller) -> bool:
        try:
            return not self.tokens.find(caller.token).objection(time.time())
        except PoolError:
            return False


def _caller(token: Token, now: float) -> Caller:
    objection = token.objection(now)
    return Caller(
        token.owner,
        token.administers,
        token.id,
        token.namespace,
        objection,
        cut=bool(objection) and token.cuts_leases,
        may=Scope(token.scope),
        one_namespace=token.one_namespace,
    )


class Throttle:
    """Counts failed attempts by key, for the most recent addresses."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def check(self, key: str) -> None:
        failures = self._failures.get(key)
        if failures is None or len(failures) < _MAX_ATTEMPTS:
            return
        left = failures[0] + _ATTEMPT_WINDOW_S - time.monotonic()
        if left > 0:
            raise TooManyAttempts(
                f"too many wrong tokens from your address; try again in {left:.0f} s, with the right one"
            )

    def failed(self, key: str) -> None:
        now = time.monotonic()
        failures = [at for at in self._failures.pop(key, []) if at > now - _ATTEMPT_WINDOW_S][
            1 - _MAX_ATTEMPTS :
        ]
        self._failures[key] = [*failures, now]
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)
