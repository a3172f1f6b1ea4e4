"""Who calls a pool that has its own server, and what they may do there."""

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

from ..engines.addresses import network
from ..pool.errors import NotAdmitted, NotAllowed, PoolError, TooManyAttempts
from ..pool.models import Request
from ..pool.tokens import Token, Tokens

#: So many wrong tokens from one address within so many seconds, and no more are looked at until these are over.
_ATTEMPTS = 10
_WINDOW_S = 60.0
_MOST_ADDRESSES = 10_000


#: What a page's WebSocket speaks, and beside it what its token follows.
PROTOCOL, TOKEN_PROTOCOL = "gpupool", "gpupool.token."


@dataclass(frozen=True)
class Caller:
    """Whose leases these are; an administrator sees everybody's. ``objection``: the token admits nobody any
    more, only what it asked for before may be kept alive or given back."""

    owner: str
    administers: bool
    token: str = ""
    namespace: str | None = None
    objection: str = ""
    cut: bool = False

    @property
    def scope(self) -> str | None:
        return None if self.administers else self.owner

    def admitted(self, request: Request) -> Request:
        """The request in the caller's namespace. Raises NotAllowed for another one's."""
        if self.namespace is None or self.administers:
            return request
        if request.namespace not in ("default", self.namespace):
            raise NotAllowed(
                f"this token is of the namespace {self.namespace!r}, not {request.namespace!r}; "
                f"ask the pool's administrator for a token of that one"
            )
        return replace(request, namespace=self.namespace)


class Doorkeeper(Protocol):
    """Knows callers by what they show."""

    def caller(self, authorization: str, address: str) -> Caller | Awaitable[Caller]:
        """Of an ``Authorization`` header; awaited where somebody else has to be asked. Raises NotAdmitted and
        TooManyAttempts."""

    def still(self, caller: Caller) -> bool:
        """Whether somebody who was admitted once would be again."""

    def expects(self, caller: Caller, lease_id: str) -> None:
        """The caller asks for a lease of that id, which may be somebody else's."""

    def note(self, caller: Caller, lease_id: str) -> None:
        """That lease is the caller's."""


async def who_calls(tokens: Doorkeeper, request: HTTPServerRequest) -> Caller:
    """Raises what :meth:`Doorkeeper.caller` raises."""
    authorization = request.headers.get("Authorization", "") or _by_subprotocol(request)
    caller = tokens.caller(authorization, request.remote_ip or "unknown")
    return await caller if inspect.isawaitable(caller) else caller


def _by_subprotocol(request: HTTPServerRequest) -> str:
    """A page's WebSocket shows its token so: it has no other header to choose."""
    offered = request.headers.get("Sec-WebSocket-Protocol", "").replace(" ", "").split(",")
    shown = [word[len(TOKEN_PROTOCOL) :] for word in offered if word.startswith(TOKEN_PROTOCOL)]
    return f"Bearer {shown[0]}" if len(shown) == 1 else ""


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _shown(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() not in ("bearer", "token") or not token.strip():
        raise NotAdmitted("this pool wants its token: Authorization: Bearer <token>")
    return token.strip()


class TokenStore:
    """A few tokens, each of which is the user's who runs this pool. Keeps their hashes."""

    def __init__(self, *tokens: str) -> None:
        self._digests = [digest(token) for token in tokens]
        self._user = getpass.getuser()

    def admits(self, authorization: str) -> bool:
        """Whether an ``Authorization`` header carries a known token; takes the same time for any wrong one."""
        try:
            shown = digest(_shown(authorization))
        except PoolError:
            return False
        admitted = False
        for known in self._digests:
            admitted |= hmac.compare_digest(shown, known)
        return admitted

    def caller(self, authorization: str, address: str) -> Caller:
        if not self.admits(authorization):
            raise NotAdmitted("this pool wants its token: Authorization: Bearer <token>")
        return Caller(self._user, administers=True)

    def still(self, caller: Caller) -> bool:
        return True

    def expects(self, caller: Caller, lease_id: str) -> None:
        pass

    def note(self, caller: Caller, lease_id: str) -> None:
        pass  # nobody takes these tokens away


class LedgerTokens:
    """The tokens of a pool that serves many, and who guesses at them."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.used: dict[str, float] = {}  # by id, since they were last recorded
        self.asked: dict[str, str] = {}  # lease → the token that asked for it, or last kept it alive
        self._throttle = _Throttle()

    def caller(self, authorization: str, address: str) -> Caller:
        shown = _shown(authorization)
        named = self.tokens.named(shown)
        # Whoever guesses locks out neither those behind the same address who know theirs, nor others elsewhere.
        key = f"{network(address)} {named.id if named else ''}"
        self._throttle.check(key)
        token = self.tokens.proven(shown)
        if token is None:
            self._throttle.failed(key)
            raise NotAdmitted(
                "this pool does not know that token; check client.yaml, or ask the pool's administrator "
                "for a new one"
            )
        now = time.time()
        self.used[token.id] = now
        return _caller(token, now)

    def note(self, caller: Caller, lease_id: str) -> None:
        self.asked[lease_id] = caller.token

    def expects(self, caller: Caller, lease_id: str) -> None:
        self.asked.setdefault(lease_id, caller.token)

    def still(self, caller: Caller) -> bool:
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
    )


class _Throttle:
    """Counts failures by key, of the last addresses only."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def check(self, key: str) -> None:
        failures = self._failures.get(key)
        if failures is None or len(failures) < _ATTEMPTS:
            return
        left = failures[0] + _WINDOW_S - time.monotonic()
        if left > 0:
            raise TooManyAttempts(
                f"too many wrong tokens from your address; try again in {left:.0f} s, with the right one"
            )

    def failed(self, key: str) -> None:
        now = time.monotonic()
        failures = [at for at in self._failures.pop(key, []) if at > now - _WINDOW_S][1 - _ATTEMPTS :]
        self._failures[key] = [*failures, now]
        if len(self._failures) > _MOST_ADDRESSES:
            self._failures.popitem(last=False)
