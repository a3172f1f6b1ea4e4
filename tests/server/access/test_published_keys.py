"""The keys of an issuer are fetched when they are needed, seldom, and kept while the issuer does not answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc.jwk import ECKey, Key, OctKey, RSAKey

from jupyter_gpupool.core.errors import IssuerUnavailable
from jupyter_gpupool.server.access.oidc import keys
from jupyter_gpupool.server.access.oidc.issuers import Issuer
from jupyter_gpupool.server.access.oidc.keys import PublishedKeys
from jupyter_gpupool.server.access.oidc.verification import Refused

ISSUER = Issuer("https://login.example.org", "gpupool")
DISCOVERY = {"issuer": ISSUER.issuer, "jwks_uri": "https://login.example.org/keys"}


def public(key: Key, **more: Any) -> dict[str, Any]:
    return {**key.as_dict(private=False), **more}


class Site(PublishedKeys):
    """Answers without a network, at a time that the test sets."""

    def __init__(self, *published: dict[str, Any], issuer: Issuer = ISSUER) -> None:
        self.now = 1000.0
        super().__init__(issuer, lambda: self.now)
        self.published: Any = list(published)
        self.discovery: dict[str, Any] = DISCOVERY
        self.asked: list[str] = []

    async def _get(self, http: httpx.AsyncClient, url: str) -> dict[str, Any]:
        self.asked.append(url)
        if self.published is None:
            raise httpx.ConnectError("connection refused")
        return self.discovery if url.endswith("openid-configuration") else {"keys": self.published}


A, B = (RSAKey.generate_key(2048, {"kid": kid}) for kid in "ab")


def test_an_unknown_key_is_asked_for_at_most_every_few_seconds() -> None:
    async def run() -> None:
        site = Site(public(A))
        assert (await site.find("a")).kid == "a" and len(site.asked) == 2
        for _ in range(100):
            with pytest.raises(Refused, match="none of those that its issuer publishes"):
                await site.find("guess")
        assert len(site.asked) == 2
        site.published = [public(B)]
        site.now += keys.MIN_INTERVAL_S
        found = await asyncio.gather(*(site.find("b") for _ in range(20)))
        assert {key.kid for key in found} == {"b"} and len(site.asked) == 4
        with pytest.raises(Refused):  # it is not published any more
            await site.find("a")

    asyncio.run(run())


def test_keys_in_use_are_refreshed_beside_the_call_and_stay_while_nobody_answers() -> None:
    async def run() -> None:
        site = Site(public(A))
        await site.find("a")
        site.now += keys.REFRESH_S + 1
        site.published = None
        for _ in range(5):
            assert (await site.find("a")).kid == "a"
            await asyncio.sleep(0)
        assert site._refreshing is not None
        await site._refreshing
        assert len(site.asked) == 3
        with pytest.raises(IssuerUnavailable, match=r"cannot be fetched \(connection refused\)"):
            await site.find("b")
        site.published = [public(A), public(B)]
        site.now += keys.MIN_INTERVAL_S
        assert (await site.find("b")).kid == "b" and (await site.find("a")).kid == "a"

    asyncio.run(run())


def test_a_token_without_a_keys_id_is_checked_by_the_only_key() -> None:
    nameless = {name: value for name, value in public(A).items() if name != "kid"}
    assert asyncio.run(Site(nameless).find(None)) is not None
    with pytest.raises(Refused):
        asyncio.run(Site(public(A), public(B)).find(None))


def test_what_is_no_key_for_signatures_is_left_out() -> None:
    secret = OctKey.import_key("x" * 40, {"kid": "secret"}).as_dict(private=True)
    published = [
        secret,
        public(A, use="enc"),
        {"kty": "RSA", "kid": "half"},
        {"kty": "new"},
        "nonsense",
        public(ECKey.generate_key("P-256"), kid="ec"),
        B.as_dict(private=True),
    ]

    async def run() -> None:
        site = Site(*published)
        assert (await site.find("ec")).key_type == "EC"
        assert not (await site.find("b")).is_private
        for kid in ("secret", "a", "half"):
            with pytest.raises(Refused):
                await site.find(kid)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("discovery", "said"),
    [
        (
            {**DISCOVERY, "issuer": "https://elsewhere.example"},
            "names the issuer 'https://elsewhere.example'",
        ),
        ({**DISCOVERY, "jwks_uri": "http://login.example.org/keys"}, "no jwks_uri of https"),
        ({"issuer": ISSUER.issuer}, "no jwks_uri of https"),
    ],
)
def test_a_discovery_document_that_is_not_the_issuers(discovery: dict[str, Any], said: str) -> None:
    site = Site(public(A))
    site.discovery = discovery
    with pytest.raises(IssuerUnavailable, match=said):
        asyncio.run(site.find("a"))


def test_an_answer_without_keys_does_not_replace_those_that_are_known() -> None:
    async def run() -> None:
        site = Site(public(A))
        await site.find("a")
        for nothing in ([], "keys", [{"kty": "oct", "k": "eA"}]):
            site.published = nothing
            site.now += keys.MIN_INTERVAL_S
            with pytest.raises(IssuerUnavailable, match="publishes no key that signs tokens"):
                await site.find("b")
        assert (await site.find("a")).kid == "a"

    asyncio.run(run())


def test_the_token_of_a_file_is_read_for_every_request(tmp_path: Path) -> None:
    file = tmp_path / "token"
    issuer = replace(ISSUER, jwks_uri="https://login.example.org/keys", keys_token_file=str(file))
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["Authorization"])
        return httpx.Response(200, json={"keys": [public(A)]})

    async def run() -> None:
        found = PublishedKeys(issuer)
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            for text in ("first\n", "second\n"):
                file.write_text(text)
                await found._get(http, issuer.jwks_uri)
        file.unlink()
        with pytest.raises(IssuerUnavailable, match="No such file"):
            await found.find("a")

    asyncio.run(run())
    assert sent == ["Bearer first", "Bearer second"]
