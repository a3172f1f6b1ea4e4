"""What a user sees of the pool in JupyterLab."""

from __future__ import annotations

import getpass
import subprocess
import sys

from playwright.sync_api import Page, expect

#: Holds two slices until its standard input ends.
HOLDER = """
import jupyter_gpupool
with jupyter_gpupool.attach(num_gpus=2, partial=0.8):
    print("attached", flush=True)
    input()
"""


def test_the_panel_lists_the_gpus(page: Page, lab: str) -> None:
    page.goto(lab)
    page.get_by_role("tab", name="GPU Pool").click()
    panel = page.get_by_role("region", name="GPU Pool")
    gpus = panel.get_by_role("listitem").filter(has_text="Tesla V100-PCIE-32GB")
    expect(gpus).to_have_count(2)
    for gpu in gpus.all():
        expect(gpu).to_contain_text("emulated")
        expect(gpu).to_contain_text("0 of 32510 MiB granted")
        meter = gpu.get_by_role("meter")
        expect(meter).to_have_attribute("aria-valuenow", "0")
        expect(meter).to_have_attribute("aria-valuemax", "32510")
    expect(panel).to_contain_text("No GPU is in use.")


def test_the_panel_follows_a_lease(page: Page, lab: str) -> None:
    page.goto(lab)
    page.get_by_role("tab", name="GPU Pool").click()
    panel = page.get_by_role("region", name="GPU Pool")
    meters = panel.get_by_role("meter")
    expect(meters).to_have_count(2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "attached\n"
        for meter in meters.all():
            expect(meter).to_have_attribute("aria-valuenow", "26008", timeout=60_000)
        lease = panel.get_by_role("region", name="Leases").get_by_role("listitem")
        expect(lease).to_have_count(1)
        expect(lease).to_contain_text(getpass.getuser())
        expect(lease).to_contain_text("GPU 0: 26008 MiB · GPU 1: 26008 MiB")
        holder.communicate("\n")
    assert holder.returncode == 0
    for meter in meters.all():
        expect(meter).to_have_attribute("aria-valuenow", "0", timeout=60_000)
    expect(panel).to_contain_text("No GPU is in use.")


def test_the_palette_opens_the_panel(page: Page, lab: str) -> None:
    page.goto(lab)
    page.wait_for_selector("#jp-main-dock-panel")
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill("GPU Pool")
    page.get_by_role("menuitem", name="Open GPU Pool").click()
    expect(page.get_by_role("region", name="GPU Pool")).to_be_visible()
