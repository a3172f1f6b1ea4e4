"""Authenticates callers by the tokens of configured issuers, and passes other tokens on."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jupyter_gpupool.core.addresses import network
from jupyter_gpupool.core.errors import Unauthenticated
from jupyter_gpupool.core.models import Request, Role
from jupyter_gpupool.pool.tenancy.namespaces import DEFAULT
from jupyter_gpupool.server.access.authentication import (
    Authenticator,
    Caller,
    LedgerTokens,
    Throttle,
    token_in,
)

from .issuers import Identity, Issuer, identity
from .keys import KeySource
from .verification import Proven, Refused, claimed, prove

#: How often the members of namespaces are compared with what a user's token grants, at least, in seconds.
_COMPARE_S = 60.0
_MAX_USERS = 20_000

#: Make what an issuer grants a user their roles in the ledger. Returns the namespaces of these that exist.
SetRoles = Callable[[str, str, Mapping[str, Role]], Awaitable[Sequence[str]]]


@dataclass(frozen=True)
class IssuedCaller(Caller):
    """A caller with an issuer's token, who may name any namespace in a request: the ledger knows their roles."""

    issuer: str = ""
    expires_at: float = 0.0

    def admitted(self, request: Request) -> Request:
        if request.namespace != DEFAULT or self.administers:
            return request
        return replace(request, namespace=self.namespace or DEFAULT)


@dataclass(frozen=True)
class _Newest:
    """What the newest token of a user granted, and when it was made so."""

    issued_at: float
    identity: Identity
    namespaces: Sequence[str] = ()
    compared_at: float = -_COMPARE_S


class IssuedTokens:
    """An authenticator for the tokens of issuers, with the keys of each."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        keys: Mapping[str, KeySource],
        set_roles: SetRoles,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._issuers = {one.issuer: one for one in issuers}
        self._keys = keys
        self._set_roles = set_roles
        self._clock = clock
        self._newest: OrderedDict[str, _Newest] = OrderedDict()
        self._comparing = asyncio.Lock()
        self._throttle = Throttle()

    async def authenticate(self, authorization: str, address: str) -> Caller:
        """Return the caller that a token proves. Raises Unauthenticated, TooManyAttempts and IssuerUnavailable."""
        text = token_in(authorization)
        # Who guesses must not lock out users behind the same address who were here before.
        counted = f"{network(address)} {self._named(text)}"
        self._throttle.check(counted)
        try:
            said = claimed(text)
            issuer = self._issuers.get(said.issuer)
            if issuer is None:
                raise Refused("its issuer is none of those that this pool accepts")
            key = await self._keys[issuer.issuer].find(said.kid)
            proven = prove(text, key, issuer, self._clock())
            named = identity(issuer, proven.claims)
        except (Refused, ValueError) as e:
            if not isinstance(e, Refused) or e.is_guess:
                self._throttle.failed(counted)
            raise Unauthenticated(f"this pool does not accept that token: {e}") from None
        return await self._caller(issuer, proven, named)

    def _named(self, text: str) -> str:
        """Return the user that a token names, if one of theirs was proven before, or nothing."""
        try:
            said = claimed(text)
            owner = identity(self._issuers[said.issuer], said.claims).owner
        except (Refused, ValueError, KeyError):
            return ""
        return owner if owner in self._newest else ""

    async def _caller(self, issuer: Issuer, proven: Proven, named: Identity) -> Caller:
        owner = named.owner
        newest = self._newest.get(owner)
        if newest is None or proven.issued_at >= newest.issued_at:
            if newest is not None and newest.identity == named:
                newest = replace(newest, issued_at=proven.issued_at)
            else:
                newest = _Newest(proven.issued_at, named)
        # An older token has the groups of the newest.
        newest = await self._compared(issuer, newest)
        objection = proven.objection
        if not objection and not newest.identity.admitted:
            objection = (
                f"Token grants nothing: none of the groups and claims of {owner} may use this pool; "
                f"ask the pool's administrator"
            )
        return IssuedCaller(
            owner,
            administers=newest.identity.administers and not objection,
            token=f"oidc:{owner}",
            namespace=newest.namespaces[0] if newest.namespaces else DEFAULT,
            objection=objection,
            issuer=issuer.issuer,
            expires_at=proven.expires_at,
        )

    async def _compared(self, issuer: Issuer, newest: _Newest) -> _Newest:
        """Return it with the namespaces that the user has, once the ledger says the same as it."""
        self._remember(newest)
        if not self._is_due(newest):
            return newest
        async with self._comparing:
            newest = self._newest.get(newest.identity.owner, newest)
            if not self._is_due(newest):
                return newest
            named = newest.identity
            namespaces = await self._set_roles(named.owner, issuer.issuer, named.roles)
            newest = replace(newest, namespaces=tuple(namespaces), compared_at=self._clock())
            current = self._newest.get(named.owner, newest)
            if current.issued_at <= newest.issued_at:
                self._remember(newest)
            return newest

    def _is_due(self, newest: _Newest) -> bool:
        return abs(self._clock() - newest.compared_at) >= _COMPARE_S

    def _remember(self, newest: _Newest) -> None:
        self._newest[newest.identity.owner] = newest
        self._newest.move_to_end(newest.identity.owner)
        if len(self._newest) > _MAX_USERS:
            self._newest.popitem(last=False)

    def is_still_valid(self, caller: Caller) -> bool:
        """Return whether the caller's token has not expired, and the user's newest one grants something."""
        if not isinstance(caller, IssuedCaller) or self._clock() >= caller.expires_at:
            return False
        newest = self._newest.get(caller.owner)
        return newest is None or (
            newest.identity.admitted and newest.identity.administers == caller.administers
        )

    def expect_lease(self, caller: Caller, lease_id: str) -> None:
        """Do nothing: these tokens are never revoked together with their leases."""

    def record_lease(self, caller: Caller, lease_id: str) -> None:
        """Do nothing: these tokens are never revoked together with their leases."""


class AllTokens:
    """An authenticator for the pool's own tokens and for those of issuers: a signed one has three parts."""

    def __init__(self, own: LedgerTokens, issued: IssuedTokens) -> None:
        self._own = own
        self._issued = issued

    def authenticate(self, authorization: str, address: str) -> Caller | Awaitable[Caller]:
        """Return the caller that an ``Authorization`` header proves."""
        is_signed = token_in(authorization).count(".") == 2
        return (self._issued if is_signed else self._own).authenticate(authorization, address)

    def is_still_valid(self, caller: Caller) -> bool:
        """Return whether a caller who was authenticated before still would be."""
        return self._of(caller).is_still_valid(caller)

    def expect_lease(self, caller: Caller, lease_id: str) -> None:
        """Note that the caller requests a lease of that id, which may turn out to be somebody else's."""
        self._of(caller).expect_lease(caller, lease_id)

    def record_lease(self, caller: Caller, lease_id: str) -> None:
        """Note that the lease is the caller's."""
        self._of(caller).record_lease(caller, lease_id)

    def _of(self, caller: Caller) -> Authenticator:
        return self._issued if isinstance(caller, IssuedCaller) else self._own
