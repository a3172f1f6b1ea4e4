"""A pool of 1,000 GPUs and 4,000 leases in a browser: first paint, scrolling, messages, size of the extension."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from .panel_in_lab import in_lab, scrolled

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "jupyter_gpupool" / "labextension"

GOALS: dict[str, tuple[str, float]] = {
    "first_paint_s": ("<=", 1.0),
    "scrolling_frames_per_s": (">=", 58.0),
    "lab_first_paint_s": ("<=", 1.0),
    "lab_scrolling_frames_per_s": (">=", 58.0),
    "idle_bytes_per_s": ("<=", 2048.0),
    "extension_kb_gzipped": ("<=", 200.0),
}


def run() -> dict[str, Any]:
    """``first_paint_s``: from the page's start to the table of the servers, the pool's state read; ``scrolling``:
    frames while the list of all leases is scrolled and the feed goes on; ``idle``: of a feed on which nothing happens;
    ``pool_cpu_share``: of one core, while one watches. ``lab_…``: see :func:`.panel_in_lab.in_lab`."""
    with tempfile.TemporaryDirectory(prefix="gpupool-bench-") as folder:
        server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.many_gpus", folder],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            process = psutil.Process(server.pid)
            return {**asyncio.run(_feed(url, process)), **_browser(url, Path(folder)), **_weight()}
        finally:
            server.terminate()
            server.wait(30)


async def _feed(url: str, server: psutil.Process, seconds: float = 10.0) -> dict[str, Any]:
    began = time.perf_counter()
    request = HTTPRequest(
        f"{url.replace('http', 'ws', 1)}/gpupool/api/v1/events", headers={"Authorization": "Bearer benchmark"}
    )
    socket = await websocket_connect(request)
    state = await socket.read_message()
    first = time.perf_counter() - began
    assert state is not None and json.loads(state)["type"] == "state"
    before, began, told, count = server.cpu_times(), time.perf_counter(), 0, 0
    while time.perf_counter() - began < seconds:
        message = await socket.read_message()
        assert message is not None
        told, count = told + len(message), count + 1
    after, passed = server.cpu_times(), time.perf_counter() - began
    socket.close()
    return {
        "state_s": round(first, 3),
        "state_mib": round(len(state) / 2**20, 2),
        "idle_bytes_per_s": round(told / passed, 1),
        "messages_per_s": round(count / passed, 2),
        "pool_cpu_share": round((after.user + after.system - before.user - before.system) / passed, 3),
    }


def _browser(url: str, folder: Path) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"),
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{url}/gpupool/console/")
        page.get_by_label("Token").fill("benchmark")
        began = time.perf_counter()
        page.get_by_role("button", name="Go on").click()
        page.get_by_role("table", name="GPU servers").wait_for()
        paint = time.perf_counter() - began
        page.get_by_role("tab", name="Leases").click()
        page.get_by_text("4,000 in all").wait_for()
        rate, slowest = scrolled(page, ".jp-GPUPoolConsole-tableScroller")
        page.close()
        lab = in_lab(browser, url, BUILT, folder)
        browser.close()
    return {
        "first_paint_s": round(paint, 3),
        "scrolling_frames_per_s": rate,
        "slowest_frame_of_100_ms": slowest,
        **lab,
    }


def _weight() -> dict[str, Any]:
    """Bytes that the browser loads in total, and at JupyterLab's start, of the last build (`jlpm build:prod`)."""
    files = {path.name: len(gzip.compress(path.read_bytes())) for path in (BUILT / "static").glob("*.js")}
    at_start = sum(size for name, size in files.items() if name.startswith("remoteEntry"))
    return {
        "extension_kb_gzipped": round(sum(files.values()) / 1024, 1),
        "remote_entry_kb_gzipped": round(at_start / 1024, 1),
    }
