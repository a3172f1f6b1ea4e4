"""Creates, extends and revokes tokens, and releases the leases of revoked ones."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from jupyter_gpupool.core.durations import format_time
from jupyter_gpupool.core.errors import NotLeading, PoolError
from jupyter_gpupool.core.models import Scope
from jupyter_gpupool.core.validation import check_namespace
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.tenancy.tokens import Token, Tokens, new_token
from jupyter_gpupool.server.service.service import PoolService

from .authentication import LedgerTokens

#: Seconds between two reads of the tokens, which another process may have changed in the ledger.
_READ_INTERVAL_S = 1.0
#: Seconds between two writes of when tokens were last used.
_RECORD_INTERVAL_S = 60.0


class Administration:
    """The tokens of a running pool. ``bundle`` returns the client's files by name, for a token and its text.

    All methods raise :mod:`jupyter_gpupool.core.errors`.
    """

    def __init__(self, service: PoolService, bundle: Callable[[Token, str], Mapping[str, str]]) -> None:
        self._service = service
        self._bundle = bundle
        self._tokens = Tokens()
        self.authenticator = LedgerTokens(self._tokens)
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the tokens, and keep them up to date."""
        await self._service.with_ledger(self._tokens.read)
        self._reader = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        """Stop reading the tokens."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            with contextlib.suppress(PoolError):  # another process may have the ledger already
                await self._record_uses()

    def tokens(self) -> list[Token]:
        """Return all tokens, with when they were last used."""
        used = self.authenticator.used
        return [
            replace(token, last_used_at=used.get(token.id, token.last_used_at))
            for token in self._tokens.all()
        ]

    async def create(
        self,
        description: str,
        owner: str,
        namespace: str,
        administers: bool,
        expires_at: float | None,
        scope: str = Scope.ADMINISTER.value,
        one_namespace: bool = False,
    ) -> tuple[Token, str, Mapping[str, str]]:
        """Create a token. Returns it, its text, and the client's files by name."""
        token = new_token(
            description,
            time.time(),
            owner=owner,
            namespace=namespace,
            administers=administers,
            expires_at=expires_at,
            scope=scope,
            one_namespace=one_namespace,
        )
        check_namespace(namespace)
        await self._service.tenants.find(namespace)
        shown = await self._service.with_ledger(lambda ledger: self._tokens.create(ledger, token))
        if not administers:
            await self._service.tenants.admit(token.owner, namespace)
        await self._note("token create", token)
        return token, shown, self._bundle(token, shown)

    async def extend(self, token_id: str, expires_at: float | None) -> Token:
        """Change when a token expires; None for never."""
        token = await self._service.with_ledger(
            lambda ledger: self._tokens.extend(ledger, token_id, expires_at)
        )
        await self._note("token extend", token)
        return token

    async def revoke(self, token_id: str, ends_leases: bool) -> Token:
        """Revoke a token. When this returns it is no longer valid, and its leases have ended if ``ends_leases``."""
        now = time.time()
        token = await self._service.with_ledger(
            lambda ledger: self._tokens.revoke(ledger, token_id, now, ends_leases)
        )
        await self._note("token revoke", token, ", its leases end" if ends_leases else "")
        if ends_leases:
            await self._cut(token)
        return token

    async def _note(self, action: str, token: Token, more: str = "") -> None:
        until = format_time(token.expires_at) if token.expires_at is not None else "for good"
        where = " in its namespace only" if token.one_namespace else ""
        outcome = f"of {token.owner}, scope {token.scope}{where}, until {until}{more}"
        await self._service.tenants.note(action, token.id, token.namespace, outcome)

    async def _cut(self, token: Token) -> None:
        """Release the token's leases. Those that this process does not know yet end at their next heartbeat."""
        # A request for somebody else's lease was refused, but noted.
        leases = await self._service.leases(token.owner)
        live = {lease.id for lease in leases if lease.request.owner == token.owner}
        mine = [lease for lease, of in self.authenticator.asked.items() if of == token.id and lease in live]
        await asyncio.gather(*(self._release(lease) for lease in mine))

    async def _release(self, lease_id: str) -> None:
        with contextlib.suppress(PoolError):  # it has ended by itself meanwhile
            await self._service.release(lease_id, None, "its token was revoked")

    async def _record_uses(self) -> None:
        used, self.authenticator.used = self.authenticator.used, {}
        if used:
            await self._service.with_ledger(partial(self._record_use, used))

    def _record_use(self, used: dict[str, float], ledger: Ledger) -> None:
        self._tokens.used(ledger, used)

    async def _keep_up(self) -> None:
        recorded = time.monotonic()
        while True:
            await asyncio.sleep(_READ_INTERVAL_S)
            try:
                await self._service.with_ledger(self._tokens.read)
                if self.authenticator.used and time.monotonic() - recorded > _RECORD_INTERVAL_S:
                    recorded = time.monotonic()
                    with contextlib.suppress(NotLeading):  # the leader records its own
                        await self._record_uses()
                    live = {lease.id for lease in await self._service.leases(None)}
                    asked = self.authenticator.asked
                    self.authenticator.asked = {lease: of for lease, of in asked.items() if lease in live}
            except PoolError as e:
                self._service.log.error("The tokens cannot be read, and are tried again: %s", e)


def shown(token: Token, now: float) -> dict[str, Any]:
    """Return a token as JSON, with its state."""
    if token.revoked_at is not None:
        state = "revoked"
    elif token.objection(now):
        state = "expired"
    else:
        state = "valid"
    return {**token.to_json(), "state": state}
