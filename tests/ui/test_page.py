"""The Console as a page that a secured server serves, for who has a token and no JupyterLab."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from jupyter_gpupool.client import bundle
from jupyter_gpupool.server.http import console

from ..conftest import PATIENCE_S
from ..server.daemon.conftest import Server, initialised
from .accessible import violations

if console.folder() is None:
    pytest.skip("the Console's page is not built (jlpm build)", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = initialised(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(ignore_https_errors=True, viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


def token(server: Server) -> str:
    return (server.folder / "admin" / bundle.CLIENT).read_text().partition("token: ")[2].strip()


def test_its_files_are_served_under_a_strict_policy(server: Server) -> None:
    trusting = ssl.create_default_context(cadata=server.ca)
    with httpx.Client(base_url=server.url, verify=trusting, timeout=PATIENCE_S) as client:
        assert client.get("/gpupool/console").headers["Location"] == "console/"
        found = client.get("/gpupool/console/")
        assert found.status_code == 200 and found.headers["Content-Type"].startswith("text/html")
        assert "script-src 'self'; style-src 'self'" in found.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in found.headers["Content-Security-Policy"]
        assert client.get("/gpupool/console/page.js").status_code == 200
        for other in ("../labextension/package.json", "page.js.map", "%2e%2e/package.json"):
            assert client.get(f"/gpupool/console/{other}").status_code in (401, 404)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_token_is_asked_for_and_shows_the_pool_live(page: Page, server: Server, scheme: str) -> None:
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text) if "Policy" in message.text else None)
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(f"{server.url}/gpupool/console/")
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("alert")).to_contain_text("does not know that token")
    page.get_by_label("Token").fill(token(server))
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("table", name="GPU servers")).to_contain_text("2 × Tesla V100-PCIE-32GB")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    page.get_by_role("tab", name="Tokens").click()
    expect(page.get_by_role("table", name="Tokens")).to_contain_text("valid")
    assert violations(page, "#console") == []
    assert not refused
