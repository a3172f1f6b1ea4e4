"""Tokens: the credentials of a shared pool's clients. The ledger has their digests, never the tokens themselves.

A token is ``<id>.<256 random bits>``. The id is not secret: people and logs name a token by it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import bindparam, insert, select, update

from jupyter_gpupool.core.durations import format_time
from jupyter_gpupool.core.errors import InvalidRequest, UnknownToken
from jupyter_gpupool.core.models import Scope
from jupyter_gpupool.core.validation import check_namespace, check_text
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.ledger.tables import tokens

_SHOWN = re.compile(r"([0-9a-f]{12})\.[A-Za-z0-9_-]{43}")
_OWNER = re.compile(r"[^A-Za-z0-9_@.-]+")

_ALL = select(tokens).order_by(tokens.c.created_at, tokens.c.id)
_ADD = insert(tokens)
_CHANGE = update(tokens).where(tokens.c.id == bindparam("of"))


@dataclass(frozen=True)
class Token:
    """One token. Times are seconds since the epoch; without ``expires_at`` it never expires.

    ``cuts_leases``: revoking it ends the leases that it requested; otherwise they go on.
    ``scope``: the most that it may do of what its user may. ``one_namespace``: it changes nothing in another one.
    """

    id: str
    description: str
    owner: str
    namespace: str
    administers: bool
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    cuts_leases: bool = False
    last_used_at: float | None = None
    scope: str = Scope.ADMINISTER.value
    one_namespace: bool = False

    def objection(self, now: float) -> str:
        """Why the token is not valid now, and what to do; empty while it is valid."""
        if self.revoked_at is not None:
            return (
                f"Token revoked at: {format_time(self.revoked_at)}; ask the pool's administrator for another one "
                f"(this was token {self.id})"
            )
        if self.expires_at is not None and now >= self.expires_at:
            return (
                f"Token expired at: {format_time(self.expires_at)}; ask the pool's administrator to extend it "
                f"(gpupool token extend {self.id}), or for another one"
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        """The token's record, by field."""
        return asdict(self)


class Tokens:
    """The tokens as last read from the ledger, and how to change them. Raises LedgerUnavailable."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Token, str]] = {}

    def read(self, ledger: Ledger) -> None:
        """Read the tokens again, as other processes may have changed them."""
        with ledger.reading() as tx:
            rows = [dict(row._mapping) for row in tx.execute(_ALL)]
        self._known = {row["id"]: (Token(**row), digest) for row in rows for digest in [row.pop("sha256")]}

    def all(self) -> list[Token]:
        """Every token, the oldest first."""
        return [token for token, _ in self._known.values()]

    def find(self, token_id: str) -> Token:
        """One token by its id. Raises UnknownToken."""
        if token_id not in self._known:
            raise UnknownToken(f"there is no token {token_id[:40]!r}; `gpupool token list` lists them")
        return self._known[token_id][0]

    def named(self, shown: str) -> Token | None:
        """The token whose id ``shown`` begins with, without checking its secret; None if there is none."""
        known = _SHOWN.fullmatch(shown)
        return self._known[known[1]][0] if known and known[1] in self._known else None

    def proven(self, shown: str) -> Token | None:
        """The token that ``shown`` proves, or None. Takes the same time for all wrong ones of one length."""
        named = self.named(shown)
        digest = self._known[named.id][1] if named else _digest("")
        same = hmac.compare_digest(_digest(shown), digest)
        return named if same else None

    # -- changes, on the ledger's thread

    def create(self, ledger: Ledger, token: Token) -> str:
        """Record a new token. Returns the credential, which cannot be recovered later. Raises InvalidRequest."""
        check_text("description", token.description)
        check_text("owner", token.owner)
        check_namespace(token.namespace)
        if not token.description.strip() or not token.owner:
            raise InvalidRequest("a token needs a description: who or what is it for?")
        if token.scope not in [known.value for known in Scope]:
            raise InvalidRequest(f"a scope is {', '.join(known.value for known in Scope)}")
        if token.administers and token.one_namespace:
            raise InvalidRequest(
                "an administrator's token is for all namespaces; create one without it, and give its user the role "
                f"administer in the namespace {token.namespace!r}"
            )
        shown = f"{token.id}.{secrets.token_urlsafe(32)}"
        with ledger.transaction() as tx:
            tx.execute(_ADD, {**asdict(token), "sha256": _digest(shown)})
        self.read(ledger)
        return shown

    def extend(self, ledger: Ledger, token_id: str, expires_at: float | None) -> Token:
        """Change when a token expires. Raises UnknownToken, and InvalidRequest for a revoked token."""
        if self.find(token_id).revoked_at is not None:
            raise InvalidRequest(f"token {token_id} was revoked, which is for good; create another one")
        return self._change(ledger, token_id, expires_at=expires_at)

    def revoke(self, ledger: Ledger, token_id: str, now: float, cuts_leases: bool) -> Token:
        """Revoke a token. Repeating it may still end its leases. Raises UnknownToken."""
        token = self.find(token_id)
        return self._change(
            ledger,
            token_id,
            revoked_at=token.revoked_at or now,
            cuts_leases=token.cuts_leases or cuts_leases,
        )

    def used(self, ledger: Ledger, when: dict[str, float]) -> None:
        """Record when tokens were last used, by id."""
        with ledger.transaction() as tx:
            for token_id, at in when.items():
                tx.execute(_CHANGE.values(last_used_at=at), {"of": token_id})
        for token_id, at in when.items():
            if token_id in self._known:
                token, digest = self._known[token_id]
                self._known[token_id] = replace(token, last_used_at=at), digest

    def _change(self, ledger: Ledger, token_id: str, **values: Any) -> Token:
        with ledger.transaction() as tx:
            if tx.execute(_CHANGE.values(**values), {"of": token_id}).rowcount != 1:
                raise UnknownToken(f"there is no token {token_id!r} any more")
        self.read(ledger)
        return self.find(token_id)


def new_token(
    description: str,
    now: float,
    *,
    owner: str = "",
    namespace: str = "default",
    administers: bool = False,
    expires_at: float | None = None,
    scope: str = Scope.ADMINISTER.value,
    one_namespace: bool = False,
) -> Token:
    """A token that is not recorded yet. Without an owner it gets one of its own, so that it shares no leases."""
    token_id = secrets.token_hex(6)
    if not owner:
        owner = f"{_OWNER.sub('-', description).strip('-')[:40] or 'token'}-{token_id[:4]}"
    return Token(
        token_id,
        description,
        owner,
        namespace,
        administers,
        now,
        expires_at,
        scope=scope,
        one_namespace=one_namespace,
    )


def _digest(shown: str) -> str:
    return hashlib.sha256(shown.encode()).hexdigest()
