"""Slices all over JupyterLab: chart, status bar, toolbar, launcher, palette, what runs, settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import httpx
import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect

from ..conftest import PATIENCE_S
from .conftest import Lab
from .test_slices import Screen, tab

pytest.importorskip("torch", reason="slices are for PyTorch programs")


@pytest.fixture(scope="module")
def screen(window: Callable[[], Page], one_lab: Lab) -> Iterator[Screen]:
    page = window()
    yield Screen(page, one_lab)
    page.context.close()


@pytest.fixture(autouse=True)
def nothing_is_held(screen: Screen, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:  # what it left must not fail the tests that follow
        screen.lab.release_everything()
    shown(screen)
    expect(screen.panel).to_contain_text("You hold no GPU slices.")


def shown(screen: Screen) -> None:
    """Has the panel shown, if it is not."""
    if screen.panel.is_hidden():
        screen.page.get_by_role("tab", name="GPU Pool").click()


def status(page: Page) -> Locator:
    return page.get_by_role("contentinfo").get_by_role("button", name=re.compile("Open the GPU pool"))


def command(page: Page, name: str) -> None:
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill(name)
    page.get_by_role("menuitem", name=name).click()


def told(chart: Locator) -> str:
    """What the chart says of the moment that it points at."""
    return chart.get_by_role("slider").get_attribute("aria-valuetext") or ""


def test_the_toolbar_asks_and_chart_and_status_bar_move(
    screen: Screen, eventually: Callable[..., object]
) -> None:
    page = screen.page
    shown(screen)
    screen.panel.get_by_role("slider", name="Use of the pool over time").press("End")
    chart = screen.panel.get_by_role("region", name="Use over time")
    eventually(lambda: "granted 0%" in told(chart), "a moment of the chart before anything is held")
    screen.panel.get_by_role("slider", name="Use of the pool over time").press("Escape")
    screen.front("train.ipynb")
    expect(status(page)).to_be_hidden()
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").get_by_role(
        "button", name=re.compile("Request GPUs for this notebook|Request GPUs")
    ).click()
    dialog = page.get_by_role("dialog", name="GPUs for this notebook")
    dialog.get_by_role("spinbutton", name="GPUs").fill("2")
    dialog.get_by_role("spinbutton", name="of each").fill("0.8")
    expect(dialog).to_contain_text("Free now")
    dialog.get_by_role("spinbutton", name="of each").press("Enter")
    expect(dialog).to_have_count(0)
    expect(status(page)).to_contain_text(re.compile(r"GPU 2 × 0\.8 · 0 of 50\.8 GiB"))

    expect(screen.run(1)).to_contain_text("trained 2")
    expect(status(page)).to_contain_text(re.compile(r"GPU 2 × 0\.8 · 1(\.\d)? of 50\.8 GiB"))
    eventually(
        lambda: re.search(r"granted 80% · 50\.8 GiB; used 2% · 1(\.\d)? GiB", told(chart)),
        "the chart to show what is granted and used",
    )
    slider = chart.get_by_role("slider")
    slider.press("Home")  # the keyboard moves through it
    eventually(lambda: "granted 0%" in told(chart), "the chart's first moment to be told")
    assert "nothing held" in told(chart)
    slider.press("End")
    eventually(lambda: "train.ipynb" in told(chart), "who held what")
    slider.press("Escape")
    chart.locator(".u-over").hover()
    page.mouse.move(900, 500)
    chart.get_by_label("Which GPU").select_option("GPU 1")
    eventually(lambda: re.search(r"granted 80% · 25\.4 GiB", told(chart)), "one GPU's own figures")
    chart.get_by_label("Which GPU").select_option("whole pool")
    chart.get_by_text("As a table").click()
    expect(chart.get_by_role("row").nth(1)).to_contain_text("52,016 MiB")
    chart.get_by_text("As a table").click()

    command(page, "Release GPUs…")
    screen.accept("Release")
    expect(status(page)).to_be_hidden()


def test_a_notebook_that_remembers_has_its_wish_in_the_picker(
    screen: Screen, eventually: Callable[..., None]
) -> None:
    screen.front("train.ipynb")
    path = screen.lab.root / "remembers.ipynb"
    content = nbformat.read(screen.lab.root / "other.ipynb", as_version=4)
    content.metadata["gpupool"] = {"num_gpus": 2, "partial": 0.25}
    nbformat.write(content, path)
    screen.page.goto(screen.lab.url.replace("/lab?", "/lab/tree/remembers.ipynb?"))
    expect(tab(screen.page, "remembers.ipynb")).to_be_visible()
    shown(screen)
    picker = screen.picker
    expect(picker.get_by_role("button", name="Attach to remembers.ipynb")).to_be_enabled()
    expect(picker.get_by_role("spinbutton", name="GPUs")).to_have_value("2")
    expect(picker.get_by_role("spinbutton", name="of each")).to_have_value("0.25")
    remember = picker.get_by_label("Remember in the notebook")
    expect(remember).to_be_checked()
    remember.uncheck()
    picker.get_by_role("button", name="Attach to remembers.ipynb").click()
    expect(screen.lease("remembers.ipynb")).to_contain_text("2 × 8,127 MiB")

    eventually(lambda: screen.saved("remembers.ipynb") is None, "the notebook is saved without its wish")

    # What runs, in JupyterLab's own list: to shut it down is to release it.
    page = screen.page
    page.get_by_role("tab", name="Running Terminals and Kernels").click()
    section = page.get_by_role("region", name="GPU Leases Section")
    item = section.locator(".jp-RunningSessions-item").filter(has_text="remembers.ipynb")
    expect(item).to_contain_text("2 × 0.25")
    item.hover()
    item.locator(".jp-RunningSessions-itemShutdown").click()
    screen.accept("Release")
    expect(section).not_to_contain_text("remembers.ipynb")


def test_the_launcher_makes_a_notebook_and_asks(screen: Screen) -> None:
    page = screen.page
    page.keyboard.press("Control+Shift+L")
    launcher = page.get_by_role("region", name="Launcher").or_(page.locator(".jp-Launcher")).last
    launcher.get_by_text("Notebook with GPUs").click()
    dialog = page.get_by_role("dialog", name="GPUs for this notebook")
    attach = dialog.get_by_role("button", name=re.compile(r"Attach to Untitled.*\.ipynb"))
    expect(attach).to_be_enabled()
    attach.click()
    expect(dialog).to_have_count(0)
    expect(status(page)).to_contain_text("GPU 1 × 0.5")
    command(page, "Release All My GPUs…")
    expect(page.get_by_role("dialog")).to_contain_text("Untitled")
    screen.accept("Release all")


def test_settings_say_what_is_shown_and_how(screen: Screen) -> None:
    page = screen.page
    expect(status(page)).to_be_hidden()
    kept = httpx.put(
        f"http://127.0.0.1:{screen.lab.port}/lab/api/settings/jupyter-gpupool:plugin",
        headers={"Authorization": f"token {Lab.TOKEN}"},
        json={"raw": json.dumps({"statusBar": "always", "units": "MiB", "numGpus": 2})},
        timeout=PATIENCE_S,
    )
    assert kept.status_code == 204, kept.text
    page.reload()
    expect(status(page)).to_contain_text("GPU: none held")
    # Until the layout of before is back, what is opened may be closed by it.
    expect(page.locator("#jupyterlab-splash")).to_have_count(0)
    status(page).click()
    expect(screen.panel.locator(".jp-GPUPool-tiles")).to_contain_text("65,020 MiB")
    expect(screen.picker.get_by_role("spinbutton", name="GPUs")).to_have_value("2")
    day = screen.panel.get_by_role("button", name="24 h")
    day.click()
    expect(day).to_have_attribute("aria-pressed", "true")
