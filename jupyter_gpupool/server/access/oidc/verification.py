"""Checks a token's signature and claims against its issuer. Pure: the key and the time are given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import Key

from jupyter_gpupool.core.durations import format_time

from .issuers import Issuer

#: What a token may call itself. A logout token, for example, has the same issuer and audience.
_TYPES = ("", "jwt", "at+jwt", "application/at+jwt")
#: What reading bytes of a stranger may raise.
_MALFORMED = (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


class _Registry(jws.JWSRegistry):
    """Bounds the parts of a token. Fields of the header that it does not know are ignored, unless they are critical."""

    max_header_length = 4096
    max_payload_length = 16 * 1024


class Refused(Exception):
    """The token is not valid; the message says why. ``is_guess``: it may be a guess, for nothing else explains it."""

    def __init__(self, message: str, is_guess: bool = True) -> None:
        super().__init__(message)
        self.is_guess = is_guess


@dataclass(frozen=True)
class Claimed:
    """What a token says about itself, before anything of it is proven."""

    issuer: str
    kid: str | None
    claims: Mapping[str, Any]


@dataclass(frozen=True)
class Proven:
    """The claims of a valid token. ``objection``: why it is valid only for what it has already got, or empty."""

    claims: Mapping[str, Any]
    issued_at: float
    expires_at: float
    objection: str


def claimed(text: str) -> Claimed:
    """Return which issuer and key a token names. Raises Refused."""
    try:
        found = jws.extract_compact(text.encode("ascii"), registry=_Registry())
        claims = json.loads(found.payload or b"")
        issuer, kid = claims["iss"], found.headers().get("kid")
    except _MALFORMED:
        raise Refused("it is not a signed JSON Web Token") from None
    if not isinstance(issuer, str) or not isinstance(kid, str | None):
        raise Refused("it is not a signed JSON Web Token")
    return Claimed(issuer, kid, claims)


def prove(text: str, key: Key, issuer: Issuer, now: float) -> Proven:
    """Return the claims of a token that the key proves. Raises Refused."""
    allowed = _Registry(algorithms=list(issuer.algorithms), strict_check_header=False)
    try:
        token = jwt.decode(text, key, algorithms=list(issuer.algorithms), registry=allowed)
        return _checked(token.header, token.claims, issuer, now)
    except _MALFORMED as e:
        # Its signature was checked before its times.
        raise Refused(_words(e), is_guess=getattr(e, "error", "") != "expired_token") from None


def _checked(header: Mapping[str, Any], claims: dict[str, Any], issuer: Issuer, now: float) -> Proven:
    kind = header.get("typ", "")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise Refused(f"it is a {kind!r}, not an access token")
    expires_at, issued_at = _time(claims, "exp"), _time(claims, "iat")
    # One that expired lately may be valid for what it has got; nothing else of it may be wrong.
    late = now >= expires_at + issuer.leeway_s
    at = expires_at if late and now < expires_at + issuer.grace_s else now
    jwt.JWTClaimsRegistry(
        now=math.floor(at),
        leeway=math.ceil(issuer.leeway_s),
        iss={"essential": True, "value": issuer.issuer},
        aud={"essential": True, "value": issuer.audience},
        sub={"essential": True},
        exp={"essential": True},
        iat={"essential": True},
    ).validate(claims)
    client = claims.get("azp", claims.get("client_id"))
    if issuer.clients and client not in issuer.clients:
        raise Refused("it was issued to another client than those that this pool accepts")
    return Proven(claims, issued_at, expires_at, _objection(issuer, issued_at, expires_at, now))


def _objection(issuer: Issuer, issued_at: float, expires_at: float, now: float) -> str:
    if now >= expires_at + issuer.leeway_s:
        return (
            f"Token expired at: {format_time(expires_at)}; log in again (gpupool login), or get another one"
        )
    if issuer.max_age_s is not None and now > issued_at + issuer.max_age_s + issuer.leeway_s:
        return (
            f"Token is older than {issuer.max_age_s:g} s (max_age_s), so its groups may have changed; "
            f"refresh it (gpupool login does so by itself), or get another one"
        )
    return ""


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e11:
        raise Refused(f"its claim {name!r} is not a time")
    return float(value)


def _words(error: BaseException) -> str:
    """Return why joserfc refused a token, in a line without anything of the token."""
    kind = getattr(error, "error", "")
    words = {
        "bad_signature": "its signature is not its issuer's",
        "unsupported_algorithm": "it is signed by an algorithm that is not accepted",
        "expired_token": "it has expired",
        "missing_claim": f"it lacks the claim {getattr(error, 'claim', '')!r}",
        "invalid_claim": f"its claim {getattr(error, 'claim', '')!r} is not what it must be",
    }
    return words.get(kind, "it is not valid")
