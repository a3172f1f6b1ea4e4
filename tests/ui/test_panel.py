"""What a user sees of the pool in JupyterLab."""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Locator, Page, expect

from .conftest import Lab

#: Holds two slices until its standard input ends.
HOLDER = """
import jupyter_gpupool
with jupyter_gpupool.attach(num_gpus=2, partial=0.8, label="a program"):
    print("attached", flush=True)
    input()
"""


@contextmanager
def holder(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    with lab.run(HOLDER) as program:
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "attached\n"
            yield program
        finally:
            program.communicate("\n", timeout=300)


@pytest.fixture(scope="module")
def page(window: Callable[[], Page], one_lab: Lab) -> Iterator[Page]:
    """JupyterLab with the panel open, for all of these tests."""
    page = window()
    page.goto(one_lab.url)
    page.get_by_role("tab", name="GPU Pool").click()
    yield page
    page.context.close()


@pytest.fixture
def panel(page: Page) -> Locator:
    return page.get_by_role("region", name="GPU Pool", exact=True)


def tile(panel: Locator, name: str) -> Locator:
    return (
        panel.locator(".jp-GPUPool-tile").filter(has=panel.page.get_by_text(name, exact=True)).locator("dd")
    )


def test_the_gpus_by_server(panel: Locator) -> None:
    gpus = panel.get_by_role("listitem").filter(has_text="Tesla V100-PCIE-32GB")
    expect(gpus).to_have_count(2)
    for gpu in gpus.all():
        expect(gpu).to_contain_text("emulated")
        expect(gpu).to_contain_text("0 of 32,510 MiB granted")
        meter = gpu.get_by_role("meter")
        expect(meter).to_have_attribute("aria-valuenow", "0")
        expect(meter).to_have_attribute("aria-valuemax", "32510")
    expect(panel).to_contain_text("You hold no GPU slices.")
    expect(tile(panel, "GPUs free")).to_have_text("2 of 2")
    expect(tile(panel, "memory free")).to_have_text("63.5 GiB")


def test_what_a_program_holds_is_there_while_it_runs(panel: Locator, one_lab: Lab) -> None:
    meters = panel.get_by_role("meter", name="Granted memory of GPU")
    with holder(one_lab):
        for meter in meters.all():
            expect(meter).to_have_attribute("aria-valuenow", "26008")
        lease = panel.get_by_role("article", name="a program")
        expect(lease).to_contain_text("2 × 26,008 MiB: GPU 0, 1 of")
        expect(tile(panel, "partly used")).to_have_text("2")
        expect(tile(panel, "largest slice now")).to_have_text("6.3 GiB")
        piece = panel.locator(".jp-GPUPool-piece.jp-mod-mine").first
        piece.hover()
        expect(piece).to_have_attribute(
            "title",
            re.compile(rf"{getpass.getuser()}\na program\n0 of 26,008 MiB used, 0% busy\nfor \d+ (s|min)"),
        )
    expect(panel).to_contain_text("You hold no GPU slices.")
    for meter in meters.all():
        expect(meter).to_have_attribute("aria-valuenow", "0")


def test_the_palette_opens_the_panel(page: Page, panel: Locator) -> None:
    page.get_by_role("tab", name="GPU Pool").click()
    expect(panel).to_be_hidden()
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill("GPU Pool")
    page.get_by_role("menuitem", name="Open GPU Pool").click()
    expect(panel).to_be_visible()
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill("Show GPU Use of the Last 24 Hours")
    page.get_by_role("menuitem", name="Show GPU Use of the Last 24 Hours").click()
    ranges = panel.get_by_role("group", name="How far back")
    expect(ranges.get_by_role("button", pressed=True)).to_have_text("24 h")
    ranges.get_by_role("button", name="5 min").click()
    expect(ranges.get_by_role("button", pressed=True)).to_have_text("5 min")


def test_a_server_that_restarts_is_seen_to_be_gone_and_then_back(panel: Locator, one_lab: Lab) -> None:
    one_lab.stop()
    expect(panel.locator(".jp-GPUPool-connection")).to_contain_text("Connection lost")
    one_lab.start()
    expect(panel.locator(".jp-GPUPool-connection")).not_to_contain_text("Connection lost")
    with holder(one_lab):
        expect(panel.get_by_role("article", name="a program")).to_be_visible()
