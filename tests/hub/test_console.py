"""The pool's pages in a hub: behind its login, and as much of the pool as one may see."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from ..conftest import PATIENCE_S
from ..support.browser import browser, jp_asyncio_loop, jp_server_cleanup, window  # noqa: F401  # fixtures
from .running import PASSWORD, Hub


@pytest.fixture(scope="module")
def hub(new_hub: Callable[..., Hub]) -> Hub:
    made = new_hub(light=True)
    made.start()
    return made


def console(hub: Hub, name: str, page: Page) -> Page:
    """Opened by somebody who has not logged in: the hub asks who that is, and leads back."""
    page.goto(f"{hub.url}/services/gpupool/gpupool/console/")
    page.locator("#username_input").fill(name)
    page.locator("#password_input").fill(PASSWORD)
    page.locator("#login_submit").click()
    expect(page.get_by_role("table", name="GPU servers")).to_contain_text("2 × Tesla V100-PCIE-32GB")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    page.get_by_role("tab", name=re.compile("Leases")).click()
    return page


def test_the_console_shows_each_what_is_theirs(
    hub: Hub,
    window: Callable[[], Page],  # noqa: F811
    eventually: Callable[..., Any],
) -> None:
    for user in ("alice", "bob"):
        hub.spawn(user, num_gpus=1, partial=0.5)
        eventually(lambda user=user: hub.ready(user), f"{user}'s server runs")
    root = console(hub, "root", window())
    for user in ("alice", "bob"):
        expect(root.get_by_role("row", name=re.compile(user))).to_be_visible()
    alice = console(hub, "alice", window())
    expect(alice.get_by_role("row", name=re.compile("alice")).first).to_be_visible()
    expect(alice.get_by_text("bob")).to_have_count(0)

    # What a page does, it does by the login: a lease is released, and a stranger's page cannot do the same.
    cookies = "; ".join(
        f"{c['name']}={c['value']}" for c in alice.context.cookies(f"{hub.url}/services/gpupool/")
    )
    (hers,) = [lease for lease in hub.pool().leases() if lease.request.owner == "alice"]
    call = f"{hub.url}/services/gpupool/gpupool/api/v1/leases/{hers.id}"
    strange = {"Cookie": cookies, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    assert httpx.delete(call, headers=strange, timeout=PATIENCE_S).status_code in (401, 403)
    assert httpx.delete(call, headers={"Cookie": cookies}, timeout=PATIENCE_S).status_code in (401, 403)
    assert hub.leases() == {"alice": "ACTIVE", "bob": "ACTIVE"}
    page = alice.context.new_page()
    page.goto(f"{hub.url}/services/gpupool/")
    page.get_by_role("button", name="Release").click()
    eventually(lambda: hub.leases() == {"bob": "ACTIVE"}, "alice has released hers")
    expect(page.get_by_text("None.")).to_be_visible()


def test_without_a_login_there_is_nothing(hub: Hub) -> None:
    base = f"{hub.url}/services/gpupool"
    for path in ("/", "/gpupool/console/", "/gpupool/console/page.js"):
        answer = httpx.get(f"{base}{path}", timeout=PATIENCE_S)
        assert "/oauth2/authorize" in answer.headers["Location"]
    for path in ("pool", "leases", "hub/offer", "hub/mine", "namespaces", "events"):
        answer = httpx.get(f"{base}/gpupool/api/v1/{path}", timeout=PATIENCE_S)
        assert answer.status_code in (400, 401, 403)
