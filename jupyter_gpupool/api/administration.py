"""What an administrator does to a pool that serves many: tokens, and what becomes of the leases they asked for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..pool.errors import PoolError
from ..pool.tokens import Token, Tokens, date, new_token
from ..pool.validation import check_namespace
from .auth import LedgerTokens
from .service import PoolService

#: How soon a change that another process made in the ledger is noticed, in seconds.
_READ_EVERY_S = 1.0
#: How often it is recorded when tokens were last used, in seconds.
_RECORD_EVERY_S = 60.0


class Administration:
    """The tokens of a pool that runs. ``bundle`` makes the client's files for what is shown of a token.

    All methods raise :mod:`jupyter_gpupool.pool.errors`.
    """

    def __init__(self, service: PoolService, bundle: Callable[[Token, str], Mapping[str, str]]) -> None:
        self._service = service
        self._bundle = bundle
        self._tokens = Tokens()
        self.doorkeeper = LedgerTokens(self._tokens)
        self._reader: asyncio.Task | None = None

    async def start(self) -> None:
        await self._service.with_ledger(self._tokens.read)
        self._reader = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    def tokens(self) -> list[Token]:
        used = self.doorkeeper.used
        return [
            replace(token, last_used_at=used.get(token.id, token.last_used_at))
            for token in self._tokens.all()
        ]

    async def create(
        self, description: str, owner: str, namespace: str, administers: bool, expires_at: float | None
    ) -> tuple[Token, str, Mapping[str, str]]:
        """The token, what is to be shown for it, and the client's files by name."""
        token = new_token(
            description,
            time.time(),
            owner=owner,
            namespace=namespace,
            administers=administers,
            expires_at=expires_at,
        )
        check_namespace(namespace)
        await self._service.tenants.find(namespace)
        shown = await self._service.with_ledger(lambda ledger: self._tokens.create(ledger, token))
        if not administers:
            await self._service.tenants.admit(token.owner, namespace)
        await self._note("token create", token)
        return token, shown, self._bundle(token, shown)

    async def extend(self, token_id: str, expires_at: float | None) -> Token:
        token = await self._service.with_ledger(
            lambda ledger: self._tokens.extend(ledger, token_id, expires_at)
        )
        await self._note("token extend", token)
        return token

    async def revoke(self, token_id: str, ends_leases: bool) -> Token:
        """When this returns the token admits nobody, and its leases have ended if that was asked for."""
        now = time.time()
        token = await self._service.with_ledger(
            lambda ledger: self._tokens.revoke(ledger, token_id, now, ends_leases)
        )
        await self._note("token revoke", token, ", its leases end" if ends_leases else "")
        if ends_leases:
            await self._cut(token)
        return token

    async def _note(self, action: str, token: Token, more: str = "") -> None:
        until = date(token.expires_at) if token.expires_at is not None else "for good"
        outcome = f"of {token.owner}, until {until}{more}"
        await self._service.tenants.note(action, token.id, token.namespace, outcome)

    async def _cut(self, token: Token) -> None:
        """Leases of which this process has not heard yet are cut by their next heartbeat."""
        # Whoever asks for somebody else's lease is refused, but was noted.
        leases = await self._service.leases(token.owner)
        live = {lease.id for lease in leases if lease.request.owner == token.owner}
        mine = [lease for lease, of in self.doorkeeper.asked.items() if of == token.id and lease in live]
        await asyncio.gather(*(self._release(lease) for lease in mine))

    async def _release(self, lease_id: str) -> None:
        with contextlib.suppress(PoolError):  # it has just ended by itself
            await self._service.release(lease_id, None, "its token was revoked")

    async def _keep_up(self) -> None:
        recorded = time.monotonic()
        while True:
            await asyncio.sleep(_READ_EVERY_S)
            try:
                await self._service.with_ledger(self._tokens.read)
                if self.doorkeeper.used and time.monotonic() - recorded > _RECORD_EVERY_S:
                    recorded = time.monotonic()
                    used, self.doorkeeper.used = self.doorkeeper.used, {}
                    await self._service.with_ledger(lambda ledger, u=used: self._tokens.used(ledger, u))
                    live = {lease.id for lease in await self._service.leases(None)}
                    asked = self.doorkeeper.asked
                    self.doorkeeper.asked = {lease: of for lease, of in asked.items() if lease in live}
            except PoolError as e:
                self._service.log.error("The tokens cannot be read: %s", e)


def shown(token: Token, now: float) -> dict[str, Any]:
    """A token as it is listed."""
    if token.revoked_at is not None:
        state = "revoked"
    elif token.objection(now):
        state = "expired"
    else:
        state = "valid"
    return {**token.to_json(), "state": state}
