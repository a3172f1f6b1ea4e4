"""Sign-ins of the Console at a real OpenID provider, as time goes by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from tornado.httputil import HTTPHeaders, HTTPServerRequest

from jupyter_gpupool.client.identity_provider import CodeRequest, Denied
from jupyter_gpupool.core.errors import PoolError, Unauthenticated
from jupyter_gpupool.core.models import Role
from jupyter_gpupool.server.access.oidc import browser_sessions
from jupyter_gpupool.server.access.oidc.authenticator import IssuedTokens
from jupyter_gpupool.server.access.oidc.browser_sessions import COOKIE, CSRF_HEADER, ConsoleSessions
from jupyter_gpupool.server.access.oidc.issuers import issuers_from
from jupyter_gpupool.server.access.oidc.keys import PublishedKeys

from ...support.certificates import Certificates
from ...support.oidc_provider import SECRET, OpenIDProvider, log_in
from ...support.ports import free_port

BACK = "https://pool.example/gpupool/signed-in"
LONGEST_S = 3600.0


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenIDProvider]:
    folder = tmp_path_factory.mktemp("provider")
    made = Certificates(folder)
    (folder / "ca.crt").write_text(made.ca)
    (folder / "secret").write_text(SECRET)
    found = OpenIDProvider(
        folder,
        free_port(),
        made.certfile,
        made.keyfile,
        folder / "ca.crt",
        groups={"ada": ["ml"], "bob": ["ml"], "eve": []},
        console=BACK,
    )
    found.start()
    yield found
    found.stop()


class Console:
    """The sessions, with a clock that the test sets."""

    def __init__(self, provider: OpenIDProvider, **settings: Any) -> None:
        self.provider = provider
        self.late_s = 0.0
        (issuer,) = issuers_from(
            [
                {
                    "issuer": provider.issuer,
                    "audience": "gpupool",
                    "ca_file": str(provider.ca),
                    "login_parameters": {"resource": "urn:pool"},
                    "console_client_id": "console",
                    "console_secret_file": str(provider.folder / "secret"),
                    "max_age_s": 60,
                    "grants": [{"claims": {"groups": "ml"}}],
                    **settings,
                }
            ]
        )
        self.issuer = issuer

        async def set_roles(owner: str, issuer: str, roles: Mapping[str, Role]) -> Sequence[str]:
            return tuple(roles)

        def clock() -> float:
            return time.time() + self.late_s

        tokens = IssuedTokens([issuer], {issuer.issuer: PublishedKeys(issuer)}, set_roles, clock)
        self.sessions = ConsoleSessions([issuer], tokens, LONGEST_S, clock)

    async def sign_in(self, user: str) -> str:
        asked = CodeRequest.new()
        page = await self.sessions.login_page(self.issuer.issuer, BACK, asked)
        where = await asyncio.to_thread(log_in, page, user, self.provider.trusted, BACK)
        answer = dict(parse_qsl(urlsplit(where).query))
        assert answer["state"] == asked.state
        return await self.sessions.begin(self.issuer.issuer, answer, BACK, asked, "192.0.2.1")

    def request(self, cookie: str) -> HTTPServerRequest:
        found = HTTPServerRequest("GET", "/", headers=HTTPHeaders({"Cookie": f"{COOKIE}={cookie}"}))
        found.headers[CSRF_HEADER] = self.sessions.secret(found)
        return found


def test_a_token_is_refreshed_when_it_is_due_and_once(provider: OpenIDProvider) -> None:
    async def scenario() -> None:
        console = Console(provider)
        request = console.request(await console.sign_in("ada"))
        first = await console.sessions.authorization(request)
        assert await console.sessions.authorization(request) == first
        console.late_s = 50
        again = await asyncio.gather(*(console.sessions.authorization(request) for _ in range(8)))
        assert len(set(again)) == 1 and again[0] != first
        assert await console.sessions.authorization(request) == again[0]

    asyncio.run(scenario())


def test_it_ends_when_the_provider_says_so_and_not_when_it_is_down(provider: OpenIDProvider) -> None:
    async def scenario() -> None:
        console = Console(provider)
        request = console.request(await console.sign_in("ada"))
        first = await console.sessions.authorization(request)
        provider.stop()
        console.late_s = 50
        try:
            assert await console.sessions.authorization(request) == first
            assert console.sessions.is_open(request)
        finally:
            provider.start()  # it has forgotten everybody
        console.late_s = 60
        with pytest.raises(Unauthenticated, match=r"your sign-in has ended \(.*\); sign in again"):
            await console.sessions.authorization(request)
        assert not console.sessions.is_open(request)

    asyncio.run(scenario())


def test_it_lasts_no_longer_than_configured(provider: OpenIDProvider) -> None:
    async def scenario() -> None:
        console = Console(provider, max_age_s=None)
        request = console.request(await console.sign_in("ada"))
        console.late_s = LONGEST_S - 60
        assert console.sessions.is_open(request)
        console.late_s = LONGEST_S
        assert not console.sessions.is_open(request)
        with pytest.raises(Unauthenticated, match="sign in again"):
            await console.sessions.authorization(request)

    asyncio.run(scenario())


def test_everywhere_means_all_of_this_users_and_nobody_elses(
    provider: OpenIDProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_sessions, "_MAX_OF_A_USER", 2)

    async def scenario() -> None:
        console = Console(provider)
        ada = [console.request(await console.sign_in("ada")) for _ in range(3)]
        bob = console.request(await console.sign_in("bob"))
        assert [console.sessions.is_open(one) for one in ada] == [False, True, True]
        assert await console.sessions.end(ada[2], everywhere=True) == 2
        assert not any(map(console.sessions.is_open, ada)) and console.sessions.is_open(bob)

    asyncio.run(scenario())


def test_who_is_granted_nothing_or_guesses_gets_no_session(provider: OpenIDProvider) -> None:
    async def scenario() -> None:
        console = Console(provider)
        with pytest.raises(Unauthenticated, match="none of the groups and claims of eve"):
            await console.sign_in("eve")
        for _ in range(11):
            with pytest.raises(Denied):
                await console.sessions.begin(
                    console.issuer.issuer, {"code": "guessed"}, BACK, CodeRequest.new(), "192.0.2.1"
                )
        await console.sign_in("ada")  # guesses keep nobody behind the same address from signing in

    asyncio.run(scenario())


def test_a_secret_that_cannot_be_read_is_said(provider: OpenIDProvider, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="OIDC.issuers: .*nothing cannot be read"):
        Console(provider, console_secret_file=str(tmp_path / "nothing"))
