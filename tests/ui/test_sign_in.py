"""People sign in to the Console at a real OpenID provider, in a real browser."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from jupyter_gpupool.server.http import console

from ..server.daemon.conftest import Server, initialised
from ..support.oidc_provider import SECRET, OpenIDProvider
from ..support.ports import free_port
from .accessible import violations

if console.folder() is None:
    pytest.skip("the Console's page is not built (jlpm build)", allow_module_level=True)

COOKIE = "__Host-gpupool"
HEADER = "X-GPUPool-CSRF"


@dataclass
class Setup:
    provider: OpenIDProvider
    server: Server


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    parent = tmp_path_factory.mktemp("sign-in")
    server = initialised(parent)
    files = (server.folder / name for name in ("server.crt", "server.key", "ca.crt"))
    groups = {"ada": ["ops"], "eve": ["elsewhere"]}
    provider = OpenIDProvider(parent, free_port(), *files, groups=groups)
    provider.console = f"{server.url}/gpupool/signed-in/localhost-{provider.port}"
    provider.start()
    (parent / "secret").write_text(SECRET + "\n")
    issuer = {
        "issuer": provider.issuer,
        "audience": "gpupool",
        "ca_file": str(provider.ca),
        "login_parameters": {"resource": "urn:pool"},
        "console_client_id": "console",
        "console_secret_file": str(parent / "secret"),
        "grants": [{"claims": {"groups": "ops"}, "administers": True}],
    }
    with (server.folder / "gpupool_config.py").open("a") as configuration:
        configuration.write(f"\nc.OIDC.issuers = [{issuer!r}]\n")
    server.start()
    yield Setup(provider, server)
    server.end()
    provider.stop()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(ignore_https_errors=True, viewport={"width": 1280, "height": 900})
    yield made
    made.close()


def http_of(setup: Setup) -> httpx.Client:
    trusted = ssl.create_default_context(cadata=setup.server.ca)
    return httpx.Client(base_url=setup.server.url, verify=trusted, trust_env=False, timeout=60)


def sign_in(page: Page, setup: Setup, user: str) -> None:
    page.goto(f"{setup.server.url}/gpupool/console/")
    page.get_by_role("link", name="Sign in with localhost").click()
    page.get_by_label("User").fill(user)
    page.get_by_role("button", name="Sign in").click()


def session(context: BrowserContext) -> str:
    found = {cookie["name"]: cookie for cookie in context.cookies()}
    assert set(found) & {COOKIE}, found
    kept = found[COOKIE]
    assert kept["secure"] and kept["httpOnly"] and kept["sameSite"] == "Strict" and kept["path"] == "/"
    return kept["value"]


def test_one_signs_in_works_and_signs_out(setup: Setup, context: BrowserContext) -> None:
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text) if "Policy" in message.text else None)
    page.goto(f"{setup.server.url}/gpupool/console/")
    expect(page.get_by_role("link", name="Sign in with localhost")).to_be_visible()
    expect(page.get_by_label("Token")).to_be_visible()
    assert violations(page, "#console") == []
    sign_in(page, setup, "ada")
    expect(page.get_by_text("ada · administers the pool")).to_be_visible()
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    page.get_by_role("tab", name="Namespaces").click()
    page.get_by_role("button", name=re.compile("^New namespace")).click()  # a change, not only reading
    dialog = page.get_by_role("dialog", name="New namespace")
    dialog.get_by_label("Name", exact=True).fill("made-by-ada")
    dialog.get_by_role("button", name="Create").click()
    expect(page.get_by_role("table", name="Namespaces")).to_contain_text("made-by-ada")
    assert violations(page, "#console") == []
    page.reload()
    expect(page.get_by_text("ada · administers the pool")).to_be_visible()  # without signing in again
    kept = session(context)
    assert page.evaluate("document.cookie") == ""
    assert page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0
    page.get_by_role("button", name="Sign out", exact=True).click()
    expect(page.get_by_role("link", name="Sign in with localhost")).to_be_visible()
    with http_of(setup) as http:
        again = http.get("/gpupool/api/v1/session", headers={"Cookie": f"{COOKIE}={kept}"})
    assert again.status_code == 401 and "sign in again" in again.json()["message"]
    assert not refused
    assert kept not in setup.server.log and SECRET not in setup.server.log


def test_signing_out_everywhere_ends_the_other_browsers_page_at_once(
    setup: Setup, browser: Browser, context: BrowserContext
) -> None:
    other = browser.new_context(ignore_https_errors=True)
    try:
        page, elsewhere = context.new_page(), other.new_page()
        for one in (page, elsewhere):
            sign_in(one, setup, "ada")
            expect(one.get_by_text("live", exact=True)).to_be_visible()
        page.get_by_role("button", name="Sign out everywhere").click()
        for one in (page, elsewhere):
            expect(one.get_by_role("link", name="Sign in with localhost")).to_be_visible()
    finally:
        other.close()


def test_who_may_not_use_the_pool_is_told_so(setup: Setup, context: BrowserContext) -> None:
    page = context.new_page()
    sign_in(page, setup, "eve")
    expect(page.get_by_role("heading")).to_have_text("You are not signed in")
    expect(page.get_by_text("none of the groups and claims of eve may use this pool")).to_be_visible()
    page.get_by_role("link", name="Back to the Console").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert COOKIE not in {cookie["name"] for cookie in context.cookies()}


def test_the_cookie_alone_does_nothing(setup: Setup, context: BrowserContext) -> None:
    """A page of another site can make a browser send it at most, and cannot read what has to come with it."""
    page = context.new_page()
    sign_in(page, setup, "ada")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    cookie = {"Cookie": f"{COOKIE}={session(context)}"}
    with http_of(setup) as http:
        secret = http.get("/gpupool/api/v1/session", headers=cookie).json()["csrf"]
        for headers in (
            cookie,
            {**cookie, HEADER: "guessed"},
            {**cookie, HEADER: "guess\xe9d".encode("latin-1")},
            {HEADER: secret},
        ):
            assert http.get("/gpupool/api/v1/whoami", headers=headers).status_code == 401
            assert http.delete("/gpupool/api/v1/session", headers=headers).status_code == 401
            assert http.get("/gpupool/api/v1/events", headers=headers).status_code == 401
        mine = http.get("/gpupool/api/v1/whoami", headers={**cookie, HEADER: secret})
        assert mine.json()["owner"] == "ada"
        assert "access-control-allow-origin" not in mine.headers


def test_answers_that_no_sign_in_of_this_browser_asked_for(setup: Setup) -> None:
    with http_of(setup) as http:
        begun = http.get("/gpupool/sign-in")
        assert begun.status_code == 302 and begun.headers["Location"].startswith(setup.provider.issuer)
        assert "code_challenge_method=S256" in begun.headers["Location"]
        _, _, kept = begun.headers["Set-Cookie"].partition("__Host-gpupool-sign-in=")
        kept = kept.partition(";")[0]
        state = kept.partition(".")[0].strip('"')
        assert state in begun.headers["Location"] and kept.split(".")[1] not in begun.headers["Location"]
        http.cookies.clear()
        back = setup.provider.console
        for cookie, query, status in (
            ("", f"code=x&state={state}", 401),
            (kept, "code=x", 401),
            (kept, "code=x&state=another", 401),
            (kept, f"code=made-up&state={state}", 401),
            (kept, f"error=access_denied&state={state}", 401),
            (kept, f"code=x&iss=https://another.example&state={state}", 401),
            (f"{state}.verifier.zz", f"code=x&state={state}", 400),
            (f"{state}.verifier.{b'https://another.example'.hex()}", f"code=x&state={state}", 401),
        ):
            headers = {"Cookie": f"__Host-gpupool-sign-in={cookie}"} if cookie else {}
            found = http.get(f"{back}?{query}", headers=headers)
            assert found.status_code == status, found.text
            assert "You are not signed in" in found.text and f"{COOKIE}=" not in str(found.headers)
        elsewhere = http.get(
            f"/gpupool/signed-in/another-example?code=x&state={state}",
            headers={"Cookie": f"__Host-gpupool-sign-in={kept}"},
        )
        assert elsewhere.status_code == 401 and "another identity provider answered" in elsewhere.text
        shown = http.get("/gpupool/sign-in?issuer=<script>alert(1)</script>")
        assert shown.status_code == 404 and "<script>" not in shown.text
        assert "default-src 'none'" in shown.headers["Content-Security-Policy"]


def test_the_sender_of_a_request_does_not_choose_where_the_code_goes(setup: Setup) -> None:
    with http_of(setup) as http:
        begun = http.get("/gpupool/sign-in", headers={"Host": "evil.example"})
    where = httpx.URL(begun.headers["Location"]).params["redirect_uri"]
    assert where == setup.provider.console


def test_while_the_provider_is_down_who_is_signed_in_goes_on(setup: Setup, context: BrowserContext) -> None:
    page = context.new_page()
    sign_in(page, setup, "ada")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    setup.provider.stop()
    try:
        page.reload()
        expect(page.get_by_text("ada · administers the pool")).to_be_visible()
        with http_of(setup) as http:
            begun = http.get("/gpupool/sign-in")
        assert begun.status_code == 302  # what the issuer says of itself is known for a while
    finally:
        setup.provider.start()
