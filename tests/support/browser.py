"""A real browser, for the tests that look at pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

#: Quiet, and content with a container: no sandbox of its own, no shared GPU, nothing fetched by itself.
BROWSER_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def run_cell(page: Page, cell: Locator) -> Locator:
    """Run a code cell; return its output."""
    prompt = cell.locator(".jp-InputPrompt")
    before = prompt.inner_text()
    while True:  # a page that is still rendering loses the key
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        with contextlib.suppress(AssertionError):
            expect(prompt).not_to_have_text(before, timeout=10_000)
            return cell.locator(".jp-OutputArea")


# Playwright's own event loop runs through all tests of a module; pytest-jupyter would close it after each.
@pytest.fixture
def jp_asyncio_loop() -> None:
    pass


@pytest.fixture
def jp_server_cleanup() -> None:
    pass


# One for each module at most: while Playwright's own event loop lives, no other test can run one.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    expect.set_options(timeout=300_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def window(browser: Browser) -> Callable[[], Page]:
    """Opens a window of its own: another user's, as far as a browser can tell."""

    def open() -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
        context.set_default_timeout(300_000)
        return context.new_page()

    return open


@pytest.fixture
def page(window: Callable[[], Page]) -> Iterator[Page]:
    page = window()
    yield page
    page.context.close()
