"""The panel in a JupyterLab that has joined a large pool, and the cost of the extension at JupyterLab's start."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_gpupool.client.pool_finder import TOKEN_VARIABLE, URL_VARIABLE

_TOKEN = "of-the-benchmark"
#: How often JupyterLab is opened with the extension, and without it.
_STARTS = 5

#: Scrolls by 120 pixels per frame for some seconds; returns the time of each frame in milliseconds.
SCROLL = """([milliseconds, scroller]) => new Promise(done => {
    const list = document.querySelector(scroller);
    const frames = [];
    const began = performance.now();
    let last = began, step = 120;
    const next = now => {
        frames.push(now - last);
        last = now;
        if (list.scrollTop + list.clientHeight >= list.scrollHeight - 1) step = -120;
        if (list.scrollTop === 0) step = 120;
        list.scrollTop += step;
        now - began < milliseconds ? requestAnimationFrame(next) : done(frames.slice(1));
    };
    requestAnimationFrame(next);
})"""


def scrolled(page: Any, scroller: str) -> tuple[float, float]:
    """Return the frames per second, and the 99th percentile of a frame's milliseconds."""
    frames = sorted(page.evaluate(SCROLL, [5000, scroller]))
    return round(1000 / statistics.fmean(frames), 1), round(frames[int(len(frames) * 0.99)], 1)


def in_lab(browser: Any, url: str, built: Path, folder: Path) -> dict[str, Any]:
    """``lab_first_paint_s``: from the click on the sidebar's tab to the pool's figures (the feed is open already: to a
    pool of one's own all leases are one's own); ``lab_start``: of a user who holds nothing, seconds from the page's
    start to the launcher, and of them in scripts, each the median of some starts."""
    with _lab("", built, folder / "with") as lab, _lab("", None, folder / "without") as bare:
        _start(browser, lab), _start(browser, bare)  # which fill the servers' caches
        pairs = [(_start(browser, lab), _start(browser, bare)) for _ in range(_STARTS)]
    with _lab(url, built, folder / "joined") as lab:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(lab)
        tab = page.get_by_role("tab", name="GPU Pool")
        tab.wait_for()
        page.wait_for_load_state("networkidle")
        began = time.perf_counter()
        tab.click()
        page.get_by_label("The pool in figures").wait_for()
        paint = time.perf_counter() - began
        page.get_by_label("GPUs by server").wait_for()
        rate, slowest = scrolled(page, ".jp-GPUPool")
        page.close()
    wall, script = ([[pair[which][figure] for pair in pairs] for which in (0, 1)] for figure in (0, 1))
    return {
        "lab_first_paint_s": round(paint, 3),
        "lab_scrolling_frames_per_s": rate,
        "lab_slowest_frame_of_100_ms": slowest,
        "lab_start_s": round(statistics.median(wall[0]), 3),
        "lab_start_without_s": round(statistics.median(wall[1]), 3),
        "lab_start_script_s": round(statistics.median(script[0]), 3),
        "lab_start_script_without_s": round(statistics.median(script[1]), 3),
        "lab_start_script_ratio": round(statistics.median(script[0]) / statistics.median(script[1]), 3),
    }


def _start(browser: Any, url: str) -> tuple[float, float]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    began = time.perf_counter()
    page.goto(url)
    page.locator(".jp-Launcher").first.wait_for()
    passed = time.perf_counter() - began
    metrics = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
    page.close()
    return passed, metrics["ScriptDuration"]


@contextmanager
def _lab(pool: str, built: Path | None, home: Path) -> Iterator[str]:
    """Start JupyterLab with that pool or one of its own, with or without the extension; yield its address."""
    extensions = home / "labextensions"
    extensions.mkdir(parents=True)
    if built is not None:
        (extensions / "jupyter-gpupool").symlink_to(built)
    folders = {f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("data", "runtime", "config")}
    joined = {URL_VARIABLE: pool, TOKEN_VARIABLE: "benchmark"} if pool else {}
    environment = {**os.environ, **folders, **joined}
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ip=127.0.0.1",
                "--port=0",
            ),
            f"--IdentityProvider.token={_TOKEN}",
            f"--LabApp.labextensions_path={extensions}",
            "--LabApp.news_url=",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            f"--ServerApp.root_dir={home}",
        ],
        env=environment,
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        info = home / "runtime" / f"jpserver-{process.pid}.json"
        deadline = time.monotonic() + 60
        while not info.exists() or not info.read_text().endswith("}"):
            assert process.poll() is None and time.monotonic() < deadline, "JupyterLab did not start"
            time.sleep(0.05)
        yield f"{json.loads(info.read_text())['url']}lab?reset&token={_TOKEN}"
    finally:
        process.terminate()
        process.wait(60)
