"""A real JupyterLab, and a real browser that looks at it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

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


# One for each test: while Playwright's own event loop lives, no other test can run one.
@pytest.fixture
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(120_000)
    yield context.new_page()
    context.close()


@pytest.fixture
def lab(jupyter_home: Path, tmp_path: Path, eventually: Callable[..., Any]) -> Iterator[str]:
    """The URL, token and all, of a `jupyter lab` whose pool has the two emulated GPUs."""
    log = tmp_path / "lab.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                *("--ip=127.0.0.1", "--port=0", "--ServerApp.port_retries=0"),
                "--LabApp.news_url=",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                f"--ServerApp.root_dir={tmp_path}",
                "--LocalEngine.emulate=always",
            ],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(jupyter_home)},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    info = jupyter_home / "runtime" / f"jpserver-{server.pid}.json"

    def url() -> str | None:
        assert server.poll() is None, log.read_text()
        try:
            said = json.loads(info.read_text())
            httpx.get(f"{said['url']}api")
        except (OSError, ValueError, httpx.TransportError):  # not there, half written, or not listening yet
            return None
        return f"{said['url']}lab?token={said['token']}"

    try:
        yield eventually(url, "JupyterLab is up", deadline_s=120)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            pytest.fail(f"JupyterLab did not end: {log.read_text()[-4000:]}")
