"""Tokens of an issuer: which are accepted, and that no other is."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey

from jupyter_gpupool.core.errors import InvalidRequest, PoolError, TooManyAttempts, Unauthenticated
from jupyter_gpupool.core.models import Request, Role
from jupyter_gpupool.server.access.authentication import Caller
from jupyter_gpupool.server.access.oidc.authenticator import IssuedTokens
from jupyter_gpupool.server.access.oidc.issuers import Issuer, identity, issuers_from
from jupyter_gpupool.server.access.oidc.verification import Refused

from ...conftest import often

NOW = 1_800_000_000.0
ISSUER = "https://login.example.org"
RSA = RSAKey.generate_key(2048, {"kid": "rsa"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})
ED = OKPKey.generate_key("Ed25519", {"kid": "ed"})
PUBLIC: dict[str | None, Key] = {
    key.kid: type(key).import_key(key.as_dict(private=False)) for key in (RSA, EC, ED)
}
CLAIMS = {
    "iss": ISSUER,
    "aud": "gpupool",
    "sub": "ada",
    "iat": NOW - 10,
    "exp": NOW + 300,
    "groups": ["ml"],
    "azp": "gpupool",
}
CONFIGURED: dict[str, Any] = {
    "issuer": ISSUER,
    "audience": "gpupool",
    "clients": ["gpupool"],
    "grants": [
        {"claims": {"groups": "ml"}, "namespace": "ml"},
        {"claims": {"groups": "leads"}, "namespace": "ml", "role": "administer"},
        {"claims": {"groups": "ops"}, "administers": True},
        {"claims": {"repository": "lab/train", "ref": "main"}, "namespace": "ci"},
    ],
}


class Keys:
    async def find(self, kid: str | None) -> Key:
        if kid not in PUBLIC:
            raise Refused("its key is none of those that its issuer publishes", is_guess=False)
        return PUBLIC[kid]


class Door:
    """An authenticator at a time that the test sets, and the roles that it set."""

    def __init__(self, **changed: Any) -> None:
        self.now = NOW
        self.roles: list[tuple[str, Mapping[str, Role]]] = []
        issuers = issuers_from([{**CONFIGURED, **changed}])
        self.tokens = IssuedTokens(issuers, {ISSUER: Keys()}, self._set_roles, lambda: self.now)

    async def _set_roles(self, owner: str, issuer: str, roles: Mapping[str, Role]) -> Sequence[str]:
        assert issuer == ISSUER
        self.roles.append((owner, dict(roles)))
        return list(roles)

    def caller(self, text: str) -> Caller:
        return asyncio.run(self.tokens.authenticate(f"Bearer {text}", "127.0.0.1"))

    def refusal(self, text: str) -> str:
        with pytest.raises(Unauthenticated) as caught:
            self.caller(text)
        assert "\n" not in str(caught.value)
        return str(caught.value)


def token(key: Key = RSA, alg: str = "RS256", header: Mapping[str, Any] | None = None, **changed: Any) -> str:
    claims = {name: value for name, value in {**CLAIMS, **changed}.items() if value is not ...}
    protected = {"alg": alg, "kid": key.kid, **(header or {})}
    return jwt.encode(protected, claims, key, algorithms=[alg])


def forged(header: Mapping[str, Any], signature: str = "", **changed: Any) -> str:
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in (header, {**CLAIMS, **changed})
    ]
    return ".".join([*parts, signature])


@pytest.mark.parametrize(("key", "alg"), [(RSA, "RS256"), (RSA, "PS256"), (EC, "ES256"), (ED, "EdDSA")])
def test_a_token_of_the_issuer_is_accepted(key: Key, alg: str) -> None:
    door = Door()
    caller = door.caller(token(key, alg))
    assert (caller.owner, caller.namespace, caller.administers, caller.objection) == ("ada", "ml", False, "")
    assert door.roles == [("ada", {"ml": Role.USE})] and door.tokens.is_still_valid(caller)
    door.caller(token(key, alg))
    assert len(door.roles) == 1, "the ledger is asked once a minute"


def with_secret(secret: bytes) -> str:
    """Signed as if the issuer's public key, which everybody has, were a secret."""
    head, body, _ = forged({"alg": "HS256", "kid": "rsa", "typ": "JWT"}).split(".")
    mac = hmac.digest(secret, f"{head}.{body}".encode(), "sha256")
    return f"{head}.{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def with_own_key() -> str:
    """Signed by a stranger, whose public key is in the header."""
    stranger = RSAKey.generate_key(2048)
    public = {name: value for name, value in stranger.as_dict(private=False).items() if name != "kid"}
    return token(stranger, header={"kid": "rsa", "jwk": public})


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "without a signature": (lambda: forged({"alg": "none", "kid": "rsa"}), "algorithm that is not accepted"),
    "without a signature, in capitals": (lambda: forged({"alg": "nOnE", "kid": "rsa"}), "algorithm"),
    "the public key as a secret": (
        lambda: with_secret(PUBLIC["rsa"].as_pem(private=False)),
        "algorithm that is not accepted",
    ),
    "the public key's JSON as a secret": (
        lambda: with_secret(json.dumps(PUBLIC["rsa"].as_dict(private=False)).encode()),
        "algorithm that is not accepted",
    ),
    "an algorithm of another kind of key": (
        lambda: token(EC, "ES256", {"kid": "rsa"}),
        "is not valid|signature",
    ),
    "an algorithm that was not configured": (lambda: token(RSA, "RS512"), "algorithm that is not accepted"),
    "another key by the same name": (
        lambda: token(RSAKey.generate_key(2048, {"kid": "rsa"})),
        "its signature is not its issuer's",
    ),
    "a key that it brings along": (lambda: with_own_key(), "its signature is not its issuer's"),
    "an unknown key": (lambda: token(header={"kid": "nobody"}), "none of those that its issuer publishes"),
    "no key": (lambda: forged({"alg": "RS256"}), "none of those"),
    "a key whose name is no text": (lambda: forged({"alg": "RS256", "kid": 1}), "not a signed"),
    "a critical header that nobody knows": (
        lambda: forged({"alg": "RS256", "kid": "rsa", "crit": ["x"], "x": 1}),
        "",
    ),
    "another issuer": (lambda: token(iss="https://elsewhere.example"), "issuer is none of those"),
    "an issuer that is nearly the same": (lambda: token(iss=f"{ISSUER}/"), "issuer is none of those"),
    "no issuer": (lambda: token(iss=...), "not a signed JSON Web Token"),
    "another audience": (lambda: token(aud="another service"), "its claim 'aud'"),
    "no audience": (lambda: token(aud=...), "it lacks the claim 'aud'"),
    "an empty list of audiences": (lambda: token(aud=[]), "aud"),
    "another client": (lambda: token(azp="stranger"), "issued to another client"),
    "another client by its other name": (lambda: token(azp=..., client_id="stranger"), "another client"),
    "no client": (lambda: token(azp=...), "another client"),
    "expired for long": (lambda: token(exp=NOW - 3601), "it has expired"),
    "no end": (lambda: token(exp=...), "its claim 'exp' is not a time"),
    "an end that is no number": (lambda: token(exp="2099"), "its claim 'exp' is not a time"),
    "an end that is too far": (lambda: token(exp=1e300), "its claim 'exp' is not a time"),
    "not yet valid": (lambda: token(nbf=NOW + 60), "its claim 'nbf'"),
    "issued tomorrow": (lambda: token(iat=NOW + 86400), "its claim 'iat'"),
    "no time of issue": (lambda: token(iat=...), "its claim 'iat' is not a time"),
    "no subject": (lambda: token(sub=...), "it lacks the claim 'sub'"),
    "a subject that is no text": (lambda: token(sub=["ada"]), "claim 'sub'"),
    "an empty subject": (lambda: token(sub=""), "sub"),
    "a subject that breaks lines": (lambda: token(sub="ada\nroot"), "owner"),
    "a subject that is too long": (lambda: token(sub="a" * 300), "owner"),
    "a logout token": (lambda: token(header={"typ": "logout+jwt"}), "not an access token"),
    "an encrypted one": (lambda: "e30.e30.e30.e30.e30", "not a signed"),
    "nothing in it": (lambda: "..", "not a signed"),
    "deep": (
        lambda: f"{base64.urlsafe_b64encode(b'[' * 9000).decode()}.{'W1tb' * 3000}.x",
        "not a signed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_token_that_is_wrong_is_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    door = Door()
    text = make()
    message = door.refusal(text)
    assert text not in message
    assert re.search(reason, message), message
    assert not door.roles


def test_guesses_are_counted_and_what_has_merely_expired_is_not() -> None:
    door = Door(grace_s=600)
    door.caller(token())
    expired, unknown = token(exp=NOW - 601, iat=NOW - 660), token(header={"kid": "newer"}, sub="eve")
    for text in (expired, unknown):
        for _ in range(20):
            door.refusal(text)
    guess = forged({"alg": "RS256", "kid": "rsa"}, "AAAA", sub="eve")
    for text in (guess, "..", token(aud="another service", sub="eve"), token(sub="")) * 2 + (guess, "a.b.c"):
        door.refusal(text)
    with pytest.raises(TooManyAttempts, match="try again in"):
        door.caller(guess)
    with pytest.raises(TooManyAttempts):
        door.caller("..")
    assert not door.caller(token()).objection, "of the same address, and was here before"


def test_signatures_and_parts_of_two_tokens_do_not_mix() -> None:
    good, other = token().split("."), token(sub="eve", groups=["ops"]).split(".")
    for mixed in ([good[0], other[1], good[2]], [other[0], good[1], other[2]]):
        Door().refusal(".".join(mixed))


def test_clocks_may_differ_by_the_leeway() -> None:
    door = Door(leeway_s=30)
    assert not door.caller(token(exp=NOW - 29, iat=NOW - 60)).objection
    assert not door.caller(token(nbf=NOW + 29, iat=NOW + 29)).objection
    assert door.caller(token(exp=NOW - 31, iat=NOW - 60)).objection.startswith("Token expired at: 20")


def test_an_expired_or_old_token_keeps_what_it_has_for_a_while() -> None:
    door = Door(grace_s=600)
    old = token(iat=NOW - 100)
    assert "Token is older than 60 s (max_age_s)" in door.caller(old).objection
    assert not Door(max_age_s=None).caller(old).objection
    caller = door.caller(token(exp=NOW - 500, iat=NOW - 560))
    assert caller.objection and not caller.cut and not door.tokens.is_still_valid(caller)
    assert "it has expired" in door.refusal(token(exp=NOW - 601, iat=NOW - 660))
    # Not, where something else is wrong with it.
    assert "'aud'" in door.refusal(token(exp=NOW - 500, iat=NOW - 560, aud="another service"))


def test_the_newest_token_says_what_the_groups_are() -> None:
    door = Door()
    member, left = token(iat=NOW - 20), token(iat=NOW - 10, groups=[])
    caller = door.caller(member)
    assert not caller.objection and door.tokens.is_still_valid(caller)
    gone = door.caller(left)
    assert "none of the groups and claims of ada may use this pool" in gone.objection
    assert door.roles[-1] == ("ada", {}) and not door.tokens.is_still_valid(caller)
    assert door.caller(member).objection, "the older one of the two has no more than the newer"
    back = door.caller(token(iat=NOW - 5, groups=["leads", "ml"]))
    assert not back.objection and door.roles[-1] == ("ada", {"ml": Role.ADMINISTER})


def test_who_administers() -> None:
    door = Door()
    caller = door.caller(token(groups=["ops"]))
    assert caller.administers and caller.scope is None
    assert not door.caller(token(iat=NOW - 5)).administers
    assert not door.tokens.is_still_valid(caller)
    old = Door().caller(token(groups=["ops"], iat=NOW - 160, exp=NOW - 100))
    assert old.objection and not old.administers


def test_a_request_is_of_the_first_namespace_that_is_granted_or_of_the_one_that_it_names() -> None:
    caller = Door().caller(token())
    request = Request(id="x", owner="ada", num_gpus=1, partial=0.5)
    assert caller.admitted(request).namespace == "ml"
    assert caller.admitted(replace(request, namespace="other")).namespace == "other"  # the ledger decides


def parsed(**changed: Any) -> Issuer:
    return issuers_from([{**CONFIGURED, **changed}])[0]


def test_claims_that_name_and_grant() -> None:
    ci = identity(parsed(user_prefix="ci:"), {"sub": "x", "repository": "lab/train", "ref": "main"})
    assert (ci.owner, ci.roles) == ("ci:x", {"ci": Role.USE})
    assert not identity(parsed(), {"sub": "x", "repository": "lab/train", "ref": "topic"}).admitted
    nested = parsed(
        grants=[{"claims": {"realm_access.roles": "gpu"}}, {"claims": {"https://x.org/g": "gpu"}}]
    )
    assert identity(nested, {"sub": "x", "realm_access": {"roles": ["gpu"]}}).roles == {"default": Role.USE}
    assert identity(nested, {"sub": "x", "https://x.org/g": "gpu"}).admitted
    assert not identity(nested, {"sub": "x", "realm_access": ["roles", "gpu"]}).admitted
    account = {"kubernetes.io": {"namespace": "team", "serviceaccount": {"name": "train"}}, "sub": "x"}
    of_account = {"kubernetes.io.namespace": "team", "kubernetes.io.serviceaccount.name": "train"}
    pods = parsed(grants=[{"claims": of_account, "namespace": "team"}])
    assert identity(pods, account).roles == {"team": Role.USE}
    assert not identity(pods, {**account, "kubernetes.io": {"namespace": "team"}}).admitted
    mail = parsed(user_claim="email")
    assert identity(mail, {"email": "a@b.org", "email_verified": True}).owner == "a@b.org"
    with pytest.raises(ValueError, match="has not verified"):
        identity(mail, {"email": "a@b.org"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"issuer": "http://login.example.org"}, "https://"),
        ({"issuer": 1}, "a dictionary with `issuer`"),
        ({"jwks_uri": "http://login.example.org/keys"}, "https://"),
        ({"keys_token_file": "/token"}, "keys_token_file needs jwks_uri"),
        ({"audience": ""}, "audience is missing"),
        ({"audience": ["gpupool"]}, "audience is not of its kind"),
        ({"algorithms": ["HS256"]}, "algorithms may be"),
        ({"algorithms": ["none"]}, "algorithms may be"),
        ({"algorithms": []}, "algorithms may be"),
        ({"grants": []}, "nobody would be admitted"),
        ({"grants": ["ml"]}, "a grant is"),
        ({"grants": [{"namespace": "ml"}]}, "a grant is"),
        ({"grants": [{"claims": {"groups": ["ml"]}}]}, "claims maps names to text"),
        ({"grants": [{"claims": {}, "role": "king"}]}, "a role is"),
        ({"grants": [{"claims": {}, "administers": "no"}]}, "True or False"),
        ({"grants": [{"claims": {}, "namespace": "no name"}]}, "namespace"),
        ({"max_age": 60}, "no setting 'max_age'"),
        ({"leeway_s": True}, "leeway_s is not of its kind"),
    ],
)
def test_settings_that_make_no_sense(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        parsed(**changed)


def test_users_of_two_issuers_are_kept_apart() -> None:
    other = {**CONFIGURED, "issuer": "https://other.example.org"}
    with pytest.raises(InvalidRequest, match="user_prefix"):
        issuers_from([CONFIGURED, other])
    with pytest.raises(InvalidRequest, match="once"):
        issuers_from([CONFIGURED, CONFIGURED])
    first = {**CONFIGURED, "user_prefix": "lab:"}
    assert len(issuers_from([first, {**other, "user_prefix": "ci:"}])) == 2


@pytest.mark.parametrize("prefixes", [("", "ci:"), ("ci:", ""), ("ci:", "ci:a:"), ("ci:", "ci:")])
def test_a_user_of_one_issuer_cannot_be_named_as_one_of_another(prefixes: tuple[str, str]) -> None:
    """Without a prefix, a user named `ci:x` would be the other issuer's `x`."""
    first, second = ({**CONFIGURED, "user_prefix": prefix} for prefix in prefixes)
    with pytest.raises(InvalidRequest, match="none of which begins with another's"):
        issuers_from([first, {**second, "issuer": "https://other.example.org"}])


# -- anything at all

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from(["iss", "aud", "sub", "exp", "iat", "nbf", "azp", "groups", "client_id", "jti"])
_HEADERS = st.sampled_from(["alg", "kid", "typ", "crit", "jwk", "jku", "x5c", "b64", "cty", "zip", "enc"])


def is_in(text: str) -> bool:
    """Whether it is let in; anything but a refusal is an error."""
    try:
        return not Door().caller(text).objection
    except PoolError as e:
        assert e.status in (401, 503)
        return False


@pytest.mark.soak
@settings(max_examples=often(300, 5000), deadline=None)
@given(st.text(alphabet=string.ascii_letters + string.digits + "-_.=", max_size=400))
def test_fuzzed_text_is_never_let_in(text: str) -> None:
    assert not is_in(f"x{text}")


@pytest.mark.soak
@settings(max_examples=often(300, 5000), deadline=None)
@given(
    st.dictionaries(_HEADERS, _JSON),
    st.dictionaries(_NAMES, _JSON),
    st.text(string.ascii_letters, max_size=90),
)
def test_fuzzed_parts_are_never_let_in(
    header: dict[str, Any], claims: dict[str, Any], signature: str
) -> None:
    assert not is_in(forged({"alg": "RS256", "kid": "rsa", **header}, signature, **claims))


@pytest.mark.soak
@settings(max_examples=often(200, 10000), deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_token_with_one_byte_changed_is_never_let_in(at: int, by: int) -> None:
    good = token()
    parts = [bytearray(base64.urlsafe_b64decode(part + "==")) for part in good.split(".")]
    spots = [(n, m) for n, part in enumerate(parts) for m in range(len(part))]
    part, spot = spots[at % len(spots)]
    parts[part][spot] ^= by
    changed = ".".join(base64.urlsafe_b64encode(bytes(part)).rstrip(b"=").decode() for part in parts)
    assert is_in(good) and not is_in(changed)


@pytest.mark.soak
@settings(max_examples=often(150, 5000), deadline=None)
@given(st.dictionaries(_NAMES, _JSON, min_size=1), st.dictionaries(_HEADERS, _JSON, max_size=2))
def test_claims_that_the_issuer_signed_and_that_make_no_sense_are_never_an_error(
    claims: dict[str, Any], header: dict[str, Any]
) -> None:
    protected = {
        "alg": "RS256",
        "kid": "rsa",
        **{k: v for k, v in header.items() if k not in ("alg", "b64", "crit")},
    }
    try:
        text = jws.serialize_compact(
            protected,
            json.dumps({**CLAIMS, **claims}),
            RSA,
            registry=jws.JWSRegistry(algorithms=["RS256"], strict_check_header=False),
        )
    except (JoseError, ValueError, TypeError, AttributeError):
        return  # joserfc does not sign such a header
    is_in(text)
