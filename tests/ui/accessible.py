"""What axe-core finds, JupyterLab's themes, and the keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

AXE = Path(__file__).resolve().parents[2] / "node_modules/axe-core/axe.min.js"
THEMES = ("JupyterLab Light", "JupyterLab Dark", "JupyterLab Dark High Contrast")

_RUN = """async selector => {
    const found = await axe.run({include: [[selector]]}, {resultTypes: ['violations']});
    return found.violations
        .filter(({impact}) => impact === 'serious' || impact === 'critical')
        .map(({id, help, nodes}) => `${id}: ${help}: ` + nodes.slice(0, 4).map(
            ({html, failureSummary}) => `${html.slice(0, 160)} (${failureSummary})`).join('; '));
}"""


def violations(page: Page, selector: str) -> list[str]:
    """The serious and critical ones within the first element of that selector, a line each."""
    expect(page.locator(selector).first).to_be_visible()
    if not page.evaluate("() => 'axe' in window"):
        if not AXE.exists():
            pytest.skip("axe-core is not installed (jlpm install)")
        page.evaluate(AXE.read_text())
    return page.evaluate(_RUN, selector)


def use_theme(page: Page, theme: str) -> None:
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill(f"Use Theme: {theme}")
    page.locator(".lm-CommandPalette-item").filter(has_text=theme).first.click()
    expect(page.locator("body")).to_have_attribute("data-jp-theme-name", theme)
    page.wait_for_function("() => document.getAnimations().every(a => a.playState !== 'running')")


def tab_to(page: Page, target: Locator, most: int = 80) -> None:
    """Presses Tab until that has the focus."""
    for _ in range(most):
        if target.count() == 1 and target.evaluate("e => e === document.activeElement"):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"{most} times Tab do not lead to {target}")
