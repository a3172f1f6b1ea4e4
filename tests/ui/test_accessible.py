"""The panel, the Console and their dialogs for people who see otherwise, or use no mouse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from .accessible import THEMES, tab_to, use_theme, violations
from .conftest import Lab
from .test_panel import holder
from .test_slices import notebook

PANEL = "#jp-gpupool-panel"
CONSOLE = "#jp-gpupool-console"


@pytest.fixture(scope="module")
def page(window: Callable[[], Page], one_lab: Lab) -> Iterator[Page]:
    """JupyterLab with a notebook whose kernel runs."""
    notebook(one_lab.root, "quiet.ipynb", "1")
    page = window()
    page.goto(one_lab.url.replace("/lab?", "/lab/tree/quiet.ipynb?"))
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    yield page
    page.context.close()


@pytest.fixture
def panel(page: Page) -> Locator:
    return page.get_by_role("region", name="GPU Pool", exact=True)


def command(page: Page, name: str) -> None:
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill(name)
    expect(page.get_by_role("menuitem", name=name)).to_be_visible()
    page.keyboard.press("Enter")


def test_a_slice_is_taken_and_given_back_by_the_keyboard_alone(page: Page, panel: Locator) -> None:
    command(page, "Open GPU Pool")
    count = panel.get_by_role("spinbutton", name="GPUs")
    tab_to(page, count)
    page.keyboard.press("ArrowUp")
    expect(count).to_have_value("2")
    share = panel.get_by_role("slider", name="Share of each GPU")
    tab_to(page, share)
    page.keyboard.press("ArrowLeft")
    expect(panel.get_by_role("spinbutton", name="of each")).to_have_value("0.45")
    attach = panel.get_by_role("button", name="Attach to quiet.ipynb")
    expect(panel).to_contain_text("Free now")
    tab_to(page, attach)
    page.keyboard.press("Enter")
    lease = panel.get_by_role("article", name="quiet.ipynb")
    expect(lease).to_contain_text("2 × 14,629 MiB")

    resize = lease.get_by_role("button", name="Resize: quiet.ipynb")
    tab_to(page, resize)
    page.keyboard.press("Enter")
    number = lease.get_by_role("spinbutton", name="New share of each GPU")
    tab_to(page, number)
    page.keyboard.press("Control+a")
    page.keyboard.type("0.25")
    page.keyboard.press("Enter")
    expect(lease).to_contain_text("2 × 8,127 MiB")

    tab_to(page, lease.get_by_role("button", name="Release: quiet.ipynb"))
    page.keyboard.press("Enter")
    question = page.get_by_role("dialog")
    expect(question).to_contain_text("Release the GPU slices of quiet.ipynb?")
    page.keyboard.press("Escape")
    expect(question).to_have_count(0)
    expect(lease).to_be_visible()
    tab_to(page, lease.get_by_role("button", name="Release: quiet.ipynb"))
    page.keyboard.press("Enter")
    tab_to(page, question.get_by_role("button", name="Release", exact=True))
    page.keyboard.press("Enter")
    expect(panel).to_contain_text("You hold no GPU slices.")


def test_the_console_is_used_by_the_keyboard_alone(page: Page, one_lab: Lab) -> None:
    command(page, "GPU Pool Console")
    console = page.get_by_role("tabpanel", name="GPU Pool Console", exact=True)
    first = console.get_by_role("tab", name="Servers and health")
    tab_to(page, first)
    page.keyboard.press("ArrowRight")
    expect(console.get_by_role("tab", name="Leases")).to_be_focused()
    with holder(one_lab):
        row = console.get_by_role("row").filter(has_text="a program")
        expect(row).to_contain_text("2 × 26,008 MiB")
        tab_to(page, console.get_by_role("searchbox"))
        page.keyboard.type("nobody's")
        expect(row).to_have_count(0)
        page.keyboard.press("Control+a")
        page.keyboard.press("Delete")
        sort = console.get_by_role("button", name="Owner")
        tab_to(page, sort)
        page.keyboard.press("Enter")
        expect(console.get_by_role("columnheader", name="Owner")).to_have_attribute("aria-sort", "ascending")
        release = row.get_by_role("button", name="Release: a program")
        tab_to(page, release)
        page.keyboard.press("Enter")
        question = page.get_by_role("dialog", name="Release the GPU slices of a program?")
        expect(question).to_be_visible()
        page.keyboard.press("Escape")
        expect(question).to_have_count(0)
        expect(release).to_be_focused()
    tab_to(page, console.get_by_role("tab", name="Leases"))
    page.keyboard.press("End")
    expect(console.get_by_role("tab", name="API")).to_have_attribute("aria-selected", "true")


def test_axe_finds_what_is_wrong(page: Page) -> None:
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=wrong><button></button></p>')")
    assert [line.partition(":")[0] for line in violations(page, "#wrong")] == ["button-name"]
    page.evaluate("document.getElementById('wrong').remove()")


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious(page: Page, panel: Locator, one_lab: Lab, theme: str) -> None:
    use_theme(page, theme)
    found: dict[str, list[str]] = {}
    with holder(one_lab):
        if not panel.is_visible():
            page.get_by_role("tab", name="GPU Pool", exact=True).click()
        lease = panel.get_by_role("article", name="a program")
        lease.get_by_role("button", name="Resize").click()
        found["panel"] = violations(page, PANEL)
        lease.get_by_role("button", name="Resize").click()
        lease.get_by_role("button", name="Release").click()
        found["question"] = violations(page, ".jp-Dialog")
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        page.locator("#jp-main-dock-panel").get_by_role("tab", name="quiet.ipynb").click()
        command(page, "Request GPUs")
        found["request"] = violations(page, ".jp-Dialog")
        page.get_by_role("dialog").get_by_role("button", name="Close").first.click()
        command(page, "GPU Pool Console")
        console = page.locator(CONSOLE)
        for view in console.get_by_role("tablist").get_by_role("tab").all():
            view.click()
            name = view.inner_text()
            expect(console.get_by_role("tabpanel")).not_to_contain_text(re.compile("Loading|Checking"))
            found[name] = violations(page, CONSOLE)
    assert not {where: lines for where, lines in found.items() if lines}
