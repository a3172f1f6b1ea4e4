"""Who may call a pool that has its own server: whoever shows a token it knows, of which it keeps hashes."""

from __future__ import annotations

import hashlib
import hmac
import secrets


def new_token() -> str:
    """256 random bits as text."""
    return secrets.token_urlsafe(32)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class TokenStore:
    """The hashes of the tokens that are admitted."""

    def __init__(self, *tokens: str) -> None:
        self._digests = [digest(token) for token in tokens]

    def admits(self, authorization: str) -> bool:
        """Whether an ``Authorization`` header carries a known token; takes the same time for any wrong one."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() not in ("bearer", "token"):
            return False
        shown = digest(token.strip())
        admitted = False
        for known in self._digests:
            admitted |= hmac.compare_digest(shown, known)
        return admitted
