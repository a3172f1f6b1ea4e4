"""The issuers whose tokens a pool accepts: what is configured about each, and what their claims grant. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from jupyter_gpupool.core.errors import InvalidRequest, PoolError
from jupyter_gpupool.core.models import Role
from jupyter_gpupool.core.validation import check_namespace, check_text
from jupyter_gpupool.pool.tenancy.namespaces import DEFAULT

#: The signatures that may be configured. None of them is made with a key that the pool would have to keep secret.
ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
_USUAL_ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA", "Ed25519")
_ROLES = tuple(role.value for role in Role)


@dataclass(frozen=True)
class Grant:
    """What callers may do whose token has all these claims, each with this value or a list that contains it."""

    claims: Mapping[str, str]
    namespace: str = DEFAULT
    role: Role = Role.USE
    administers: bool = False

    def covers(self, claims: Mapping[str, Any]) -> bool:
        """Return whether a token has the claims."""
        return all(value in _values(claims, name) for name, value in self.claims.items())


@dataclass(frozen=True)
class Issuer:
    """An issuer of tokens. Times are in seconds.

    ``user_claim`` names the user, after ``user_prefix``. ``max_age_s``: how old a token may be; None for as long as
    it is valid. ``grace_s``: how long an expired token still renews and releases leases. ``client_id``: the public
    client that people log in with, which asks for ``login_scopes`` and sends ``login_parameters`` besides.
    ``console_client_id``: the client of the Console, with the secret in ``console_secret_file`` unless it is public.
    ``keys_token_file``: a file whose token is sent with requests for the keys, and read for each of them.
    """

    issuer: str
    audience: str
    user_claim: str = "sub"
    user_prefix: str = ""
    grants: tuple[Grant, ...] = ()
    clients: tuple[str, ...] = ()
    algorithms: tuple[str, ...] = _USUAL_ALGORITHMS
    leeway_s: float = 30.0
    max_age_s: float | None = 60.0
    grace_s: float = 3600.0
    jwks_uri: str = ""
    ca_file: str = ""
    keys_token_file: str = ""
    client_id: str = ""
    login_scopes: str = "openid offline_access"
    login_parameters: Mapping[str, str] = field(default_factory=dict)
    console_client_id: str = ""
    console_secret_file: str = ""


def place(issuer: str) -> str:
    """Return an issuer's part of the address that it sends browsers back to.

    Each has one of its own, so that a code of one can never be redeemed at another.

    >>> place("https://login.example.org/realms/lab")
    'login-example-org-realms-lab'
    """
    return re.sub(r"[^a-z0-9]+", "-", issuer.lower().removeprefix("https://")).strip("-")


@dataclass(frozen=True)
class Identity:
    """Who a token's claims name, and what they grant: roles by namespace, in the order of the grants."""

    owner: str
    roles: Mapping[str, Role]
    administers: bool

    @property
    def admitted(self) -> bool:
        """Whether anything is granted."""
        return self.administers or bool(self.roles)


def identity(issuer: Issuer, claims: Mapping[str, Any]) -> Identity:
    """Return who a token's claims name. Raises ValueError, with a line, where they name nobody."""
    name = claims.get(issuer.user_claim)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"it has no claim {issuer.user_claim!r} that names a user")
    if issuer.user_claim == "email" and claims.get("email_verified") is not True:
        raise ValueError("its issuer has not verified the e-mail address")
    owner = issuer.user_prefix + name
    try:
        check_text("owner", owner)
    except PoolError as e:
        raise ValueError(str(e)) from None
    found = [grant for grant in issuer.grants if grant.covers(claims)]
    roles: dict[str, Role] = {}
    for grant in found:
        if not grant.administers:
            best = max(grant.role, roles.get(grant.namespace, grant.role), key=_rank)
            roles[grant.namespace] = best
    return Identity(owner, roles, any(grant.administers for grant in found))


def _rank(role: Role) -> int:
    return _ROLES.index(role.value)


def _values(claims: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return the values of a claim; ``realm_access.roles`` is the claim of that name, or one inside another."""
    value = _inside(claims, name)
    return value if isinstance(value, list) else [value]


def _inside(claims: Any, name: str) -> Any:
    """Return the claim of that name, or the one that its parts lead to: the names of claims may have dots themselves,
    such as ``kubernetes.io`` in ``kubernetes.io.namespace``. The longest name counts. None if there is none."""
    if not isinstance(claims, Mapping):
        return None
    if name in claims:
        return claims[name]
    for at in reversed([n for n, letter in enumerate(name) if letter == "."]):
        if name[:at] in claims:
            return _inside(claims[name[:at]], name[at + 1 :])
    return None


# -- configuration


def issuers_from(configured: Sequence[Mapping[str, Any]]) -> tuple[Issuer, ...]:
    """Return the issuers of ``c.OIDC.issuers``. Raises InvalidRequest with a line that says what to change."""
    found = tuple(_issuer(one) for one in configured)
    names = [one.issuer for one in found]
    if len(set(names)) < len(names):
        raise InvalidRequest("each issuer may be there once; put all of its grants together")
    at_console = [place(one.issuer) for one in found if one.console_client_id]
    if len(set(at_console)) < len(at_console):
        raise InvalidRequest(f"the Console cannot tell these issuers apart: {', '.join(names)}")
    if any(a is not b and a.user_prefix.startswith(b.user_prefix) for a in found for b in found):
        raise InvalidRequest(
            "several issuers need a user_prefix each, none of which begins with another's, or users of one could be "
            "those of another"
        )
    return found


def _issuer(given: Mapping[str, Any]) -> Issuer:
    if not isinstance(given, Mapping) or not isinstance(given.get("issuer"), str):
        raise InvalidRequest("an issuer is a dictionary with `issuer`, its URL, and `audience`")
    url = given["issuer"]
    known = [one.name for one in fields(Issuer)]
    for name, value in given.items():
        if name not in known:
            raise InvalidRequest(f"{url}: there is no setting {name!r}; there are {', '.join(known)}")
        if not isinstance(value, _KINDS.get(name, (str,))) or isinstance(value, bool):
            raise InvalidRequest(f"{url}: {name} is not of its kind: {value!r}")
    for name in ("issuer", "jwks_uri"):
        parts = urlsplit(given.get(name, "https://x"))
        if parts.scheme != "https" or not parts.hostname:
            raise InvalidRequest(
                f"{name}={given[name]!r} must be an https:// URL, for its keys decide who is admitted"
            )
    if given.get("keys_token_file") and not given.get("jwks_uri"):
        raise InvalidRequest(
            f"{url}: keys_token_file needs jwks_uri, or the token would be sent wherever the issuer's document points"
        )
    if not given.get("audience"):
        raise InvalidRequest(
            f"{url}: audience is missing: without it, tokens for other services would be accepted"
        )
    algorithms = tuple(given.get("algorithms", _USUAL_ALGORITHMS))
    if not algorithms or not set(algorithms) <= set(ALGORITHMS):
        raise InvalidRequest(
            f"{url}: algorithms may be {', '.join(ALGORITHMS)}; not {', '.join(map(str, algorithms))}"
        )
    if not given.get("grants"):
        raise InvalidRequest(
            f"{url}: grants is missing, so nobody would be admitted; `{{'claims': {{}}}}` admits all"
        )
    for name in ("client_id", "console_client_id"):
        if given.get(name) and given.get("clients") and given[name] not in given["clients"]:
            raise InvalidRequest(
                f"{url}: the {name} {given[name]!r} is not in clients, so its tokens would not be accepted"
            )
    return Issuer(
        **{
            **given,
            "algorithms": algorithms,
            "clients": tuple(map(str, given.get("clients", ()))),
            "grants": tuple(_grants(url, given["grants"])),
        }
    )


_KINDS: dict[str, tuple[type, ...]] = {
    "grants": (list, tuple),
    "clients": (list, tuple),
    "algorithms": (list, tuple),
    "leeway_s": (int, float),
    "max_age_s": (int, float, type(None)),
    "grace_s": (int, float),
    "login_parameters": (dict,),
}


def _grants(url: str, given: Sequence[Any]) -> Iterator[Grant]:
    for one in given:
        claims = one.get("claims") if isinstance(one, Mapping) else None
        if not isinstance(claims, Mapping) or not set(one) <= {"claims", "namespace", "role", "administers"}:
            raise InvalidRequest(
                f"{url}: a grant is {{'claims': {{name: value}}, 'namespace': …, 'role': …}} or "
                f"{{'claims': …, 'administers': True}}; not {one!r}"
            )
        if not all(isinstance(word, str) for pair in claims.items() for word in pair):
            raise InvalidRequest(f"{url}: claims maps names to text; not {claims!r}")
        role = one.get("role", Role.USE.value)
        if role not in _ROLES:
            raise InvalidRequest(f"{url}: a role is {', '.join(_ROLES)}; not {role!r}")
        administers = one.get("administers", False)
        if not isinstance(administers, bool):
            raise InvalidRequest(f"{url}: administers is True or False; not {administers!r}")
        namespace = one.get("namespace", DEFAULT)
        try:
            check_namespace(namespace)
        except PoolError as e:
            raise InvalidRequest(f"{url}: {e}") from None
        yield Grant(dict(claims), namespace, Role(role), administers)
