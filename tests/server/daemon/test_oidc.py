"""A secured server that accepts the tokens of a real OpenID provider."""

from __future__ import annotations

import base64
import hmac
import itertools
import json
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jwt

from jupyter_gpupool.client import requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.api import PREFIX
from jupyter_gpupool.core.errors import (
    IssuerUnavailable,
    PermissionDenied,
    PoolError,
    Unauthenticated,
    UnknownLease,
)
from jupyter_gpupool.core.models import Lease

from ...conftest import PATIENCE_S, often
from ...support.oidc_provider import OpenIDProvider, new_key
from ...support.ports import free_port
from .conftest import Server, initialised


@dataclass
class Setup:
    """A provider, and a server that accepts its tokens: of the group `ml` in the namespace `ml`."""

    provider: OpenIDProvider
    server: Server

    def client(self, text: str) -> PoolClient:
        return self.server.client(text)

    def claims(self, **changed: Any) -> dict[str, Any]:
        now = time.time()
        known = {
            "iss": self.provider.issuer,
            "aud": "gpupool",
            "sub": "ci",
            "client_id": "ci",
            "groups": ["ml"],
            "iat": now,
            "exp": now + 3600,
        }
        return {name: value for name, value in {**known, **changed}.items() if value is not ...}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    parent = tmp_path_factory.mktemp("oidc")
    server = initialised(parent)
    folder = server.folder
    provider = OpenIDProvider(
        parent,
        free_port(),
        *(folder / name for name in ("server.crt", "server.key", "ca.crt")),
        groups={"ci": ["ml"], "leaver": ["ml"], "guest": ["ml"], "ops": ["ops"], "stranger": ["ml"]},
        clients=("ci", "leaver", "guest", "ops", "nobody", "stranger"),
    )
    provider.start()
    issuer = {
        "issuer": provider.issuer,
        "audience": "gpupool",
        "clients": ["ci", "leaver", "guest", "ops", "nobody", "gpupool"],
        "ca_file": str(provider.ca),
        "max_age_s": 600,  # a busy machine may take a while
        "grants": [
            {"claims": {"groups": "ml"}, "namespace": "ml"},
            {"claims": {"groups": "ops"}, "administers": True},
        ],
    }
    with (folder / "gpupool_config.py").open("a") as configuration:
        configuration.write(f"\nc.OIDC.issuers = [{issuer!r}]\n")
    server.start()
    server.administrator().create_namespace("ml", {})
    yield Setup(provider, server)
    server.end()
    provider.stop()


def held(client: PoolClient) -> Lease:
    request, _ = requests.new_request(partial=0.1)
    return client.request(request)


def test_who_a_token_names_and_what_its_groups_grant(setup: Setup) -> None:
    ci = setup.client(setup.provider.token("ci"))
    assert ci.whoami() == {
        "owner": "ci",
        "administers": False,
        "namespace": "ml",
        "role": "use",
        "namespaces": {"default": "use", "ml": "use"},
    }
    lease = held(ci)
    assert (lease.request.owner, lease.request.namespace) == ("ci", "ml")
    ops = setup.client(setup.provider.token("ops"))
    assert ops.whoami()["administers"] and lease.id in [found.id for found in ops.leases()]
    own = setup.client(setup.server.token(owner="eve")["token"])  # the pool's own tokens stay
    with pytest.raises(UnknownLease):
        own.release(lease.id)
    with pytest.raises(PermissionDenied, match="requires an administrator token"):
        ci.tokens()
    assert ci.release(lease.id).state.ended
    nobody = setup.client(setup.provider.token("nobody"))
    with pytest.raises(
        Unauthenticated, match="Token grants nothing: none of the groups and claims of nobody"
    ):
        nobody.whoami()
    entries = [(one["action"], one["subject"]) for one in setup.server.administrator().audit()]
    assert ("member issued", "ci") in entries


def from_address(setup: Setup, address: str) -> httpx.Client:
    """A client with an address of its own on the loopback, whose wrong tokens are counted apart."""
    transport = httpx.HTTPTransport(verify=setup.provider.trusted, local_address=address)
    base_url = f"https://127.0.0.1:{setup.server.port}{PREFIX}"
    return httpx.Client(transport=transport, base_url=base_url, timeout=PATIENCE_S)


ATTACKS: dict[str, tuple[Callable[[Setup], str], str]] = {
    "no signature": (lambda s: unsigned(s.claims()), "algorithm that is not accepted"),
    "the public key as a secret": (lambda s: with_public_key(s), "algorithm that is not accepted"),
    "another key": (
        lambda s: jwt.encode({"alg": "RS256", "kid": s.provider.key.kid}, s.claims(), new_key("x")),
        "its signature is not its issuer's",
    ),
    "another audience": (lambda s: s.provider.token("ci", resource="urn:other"), "its claim 'aud'"),
    "another client": (lambda s: s.provider.token("stranger"), "issued to another client"),
    "another issuer": (
        lambda s: s.provider.signed(s.claims(iss="https://localhost:1")),
        "its issuer is none of those",
    ),
    "expired": (
        lambda s: s.provider.signed(s.claims(iat=time.time() - 100, exp=time.time() - 40)),
        "Token expired at",
    ),
    "not yet valid": (lambda s: s.provider.signed(s.claims(nbf=time.time() + 600)), "its claim 'nbf'"),
    "no audience": (lambda s: s.provider.signed(s.claims(aud=...)), "it lacks the claim 'aud'"),
    "old": (lambda s: s.provider.signed(s.claims(iat=time.time() - 1000)), "Token is older than 600 s"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_token_that_is_wrong_gets_nothing(setup: Setup, name: str) -> None:
    make, reason = ATTACKS[name]
    text = make(setup)
    with from_address(setup, f"127.0.1.{1 + list(ATTACKS).index(name)}") as http:
        for method, path in (("GET", "whoami"), ("GET", "pool"), ("GET", "leases"), ("POST", "leases")):
            answer = http.request(method, f"/{path}", headers={"Authorization": f"Bearer {text}"})
            assert answer.status_code == 401 and reason in answer.json()["message"]
    assert text.rpartition(".")[2] not in setup.server.log or not text.rpartition(".")[2]


def test_a_group_that_is_left_keeps_what_runs_and_gets_no_more(setup: Setup) -> None:
    client = setup.client(setup.provider.token("leaver"))
    lease = held(client)
    left = setup.client(setup.provider.signed(setup.claims(sub="leaver", groups=[], iat=time.time() + 1)))
    assert not left.heartbeat(lease.id).state.ended and left.lease(lease.id).id == lease.id
    for former in (left, client):  # nor by the older token, which still has the group
        with pytest.raises(Unauthenticated, match="Token grants nothing"):
            held(former)
    members = {one["name"]: one["members"] for one in setup.server.administrator().namespaces()}
    assert "leaver" not in members["ml"]
    assert left.release(lease.id).state.ended
    back = setup.client(setup.provider.signed(setup.claims(sub="leaver", iat=time.time() + 2)))
    assert back.release(held(back).id).state.ended


def test_a_role_that_a_person_gave_is_not_the_issuers_to_take(setup: Setup) -> None:
    admin = setup.server.administrator()
    assert setup.client(setup.provider.token("guest")).whoami()["namespaces"]["ml"] == "use"
    admin.create_namespace("guests", {"members": {"guest": "use"}})
    admin.set_member("ml", "guest", "administer")
    later = setup.provider.signed(setup.claims(sub="guest", iat=time.time() + 1, groups=["ops"]))
    assert setup.client(later).whoami()["administers"]
    members = {one["name"]: one["members"] for one in admin.namespaces()}
    assert members["guests"] == {"guest": "use"} and members["ml"]["guest"] == "administer"


_numbers = itertools.count()


@pytest.mark.soak
@settings(max_examples=often(40, 5000), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(string.ascii_letters + string.digits + "-_.", max_size=200), st.sampled_from(["GET", "POST"]))
def test_fuzzed_tokens_are_refused_and_never_an_error(setup: Setup, text: str, method: str) -> None:
    with from_address(setup, "127.1.{}.{}".format(*divmod(next(_numbers), 250))) as http:
        for shown in (f"{text}.{text}.{text}", f"{unsigned(setup.claims())}{text}"):
            answer = http.request(method, "/leases", headers={"Authorization": f"Bearer {shown}"})
            assert answer.status_code == 401 and answer.json()["error"] == "Unauthenticated"


def test_guessing_is_throttled_and_disturbs_nobody_who_was_here_before(setup: Setup) -> None:
    known = {"Authorization": f"Bearer {setup.provider.token('ci')}"}
    with from_address(setup, "127.2.0.1") as http:
        assert http.get("/whoami", headers=known).status_code == 200
        header = {"alg": "RS256", "kid": setup.provider.key.kid}
        forged = jwt.encode(header, setup.claims(sub="somebody"), new_key("x"))
        guess = {"Authorization": f"Bearer {forged}"}
        found = [http.get("/whoami", headers=guess).json()["error"] for _ in range(12)]
        assert found == ["Unauthenticated"] * 10 + ["TooManyAttempts"] * 2
        assert http.get("/whoami", headers=known).status_code == 200


def test_keys_rotate(setup: Setup, eventually: Callable[..., Any]) -> None:
    before = setup.provider.token("ops")
    assert setup.client(before).whoami()["administers"]
    setup.provider.rotate("second")
    after = setup.provider.token("ops")
    newer = setup.client(after)
    eventually(lambda: is_accepted(newer), "the new key is fetched")
    with pytest.raises(Unauthenticated, match="none of those that its issuer publishes"):
        setup.client(before).whoami()


def test_a_provider_that_is_down_costs_those_nothing_whose_keys_are_known(
    setup: Setup, eventually: Callable[..., Any]
) -> None:
    key = setup.provider.key
    now = setup.client(setup.provider.token("ops"))
    eventually(lambda: is_accepted(now), "its key is known")
    setup.provider.stop()
    unknown = jwt.encode({"alg": "RS256", "kid": "third"}, setup.claims(), new_key("third"))

    asking = setup.client(unknown)

    def says_why() -> bool:
        with pytest.raises(PoolError) as caught:
            asking.whoami()
        return isinstance(caught.value, IssuerUnavailable) and "cannot be fetched" in str(caught.value)

    eventually(says_why, "a key that is not known is asked for, and nobody answers")
    known = jwt.encode({"alg": "RS256", "kid": key.kid}, setup.claims(sub="ops", groups=["ops"]), key)
    assert setup.client(known).whoami()["administers"]
    assert setup.server.administrator().whoami()["administers"]
    setup.provider.start()
    setup.provider.rotate("fourth")
    fresh = setup.provider.token("ops")
    newest = setup.client(fresh)
    eventually(lambda: is_accepted(newest), "it answers again")


def is_accepted(client: PoolClient) -> bool:
    try:
        return bool(client.whoami())
    except PoolError:
        return False


def unsigned(claims: dict[str, Any], alg: str = "none") -> str:
    parts = ({"alg": alg, "kid": "first", "typ": "JWT"}, claims)
    return "".join(
        f"{base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b'=').decode()}." for p in parts
    )


def with_public_key(setup: Setup) -> str:
    text = unsigned(setup.claims(), "HS256").rstrip(".")
    mac = hmac.digest(setup.provider.key.as_pem(private=False), text.encode(), "sha256")
    return f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
