"""The README's pictures, from a real JupyterLab: `make pictures`. No test of every run, for it writes into docs/."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from .conftest import Lab
from .test_slices import notebook

pytest.importorskip("torch", reason="slices are for PyTorch programs")

#: What a reader sees: a training on two devices that moves the chart.
CELLS = (
    """\
import torch
from torch import nn

torch.cuda.device_count(), torch.cuda.get_device_name()""",
    """\
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 10)).cuda()
features = torch.empty(8, 1024, 1024, 256, device="cuda:1")  # 8 GiB, on the second GPU
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
x, y = torch.randn(1024, 784).cuda(), torch.randint(0, 10, (1024,)).cuda()""",
    """\
for step in range(200):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")""",
)


def use_theme(page: Page, theme: str) -> None:
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill(f"Use Theme: {theme}")
    page.locator(".lm-CommandPalette-item").filter(has_text=theme).first.click()
    expect(page.locator("body")).to_have_attribute("data-jp-theme-name", theme)


def test_pictures(
    window: Callable[[], Page], one_lab: Lab, project_root: Path, eventually: Callable[..., object]
) -> None:
    page = window()
    page.set_viewport_size({"width": 1280, "height": 860})
    notebook(one_lab.root, "train.ipynb", *CELLS)
    page.goto(one_lab.url.replace("/lab?", "/lab/tree/train.ipynb?"))
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    page.get_by_role("tab", name="GPU Pool").click()
    panel = page.get_by_role("region", name="GPU Pool", exact=True)
    picker = panel.get_by_role("region", name="Request GPUs")
    picker.get_by_role("spinbutton", name="GPUs").fill("2")
    picker.get_by_role("spinbutton", name="of each").fill("0.8")
    picker.get_by_role("button", name="Attach to train.ipynb").click()
    expect(panel.get_by_role("article", name="train.ipynb")).to_be_visible()
    cells = page.locator(".jp-NotebookPanel .jp-CodeCell")
    for n in range(3):
        cells.nth(n).locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
    expect(cells.nth(2).locator(".jp-OutputArea")).to_contain_text("step 150", timeout=240_000)
    slider = panel.get_by_role("slider", name="Use of the pool over time")
    eventually(
        lambda: re.search("used 1[0-9]%", slider.get_attribute("aria-valuetext") or ""),
        "the chart to show what is used",
    )
    page.locator("#jp-main-statusbar").hover()
    for theme, name in (("JupyterLab Light", "panel.png"), ("JupyterLab Dark", "panel-dark.png")):
        use_theme(page, theme)
        page.wait_for_function("() => document.getAnimations().every(a => a.playState !== 'running')")
        page.wait_for_timeout(1500)  # the feed's next message draws in the new colours
        page.screenshot(path=project_root / "docs" / name)
    page.context.close()
