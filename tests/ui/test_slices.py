"""A user takes slices for a notebook in the panel, works with them, and gives them back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, Page, expect

from ..conftest import PATIENCE_S
from ..support.browser import run_cell
from .conftest import Lab

pytest.importorskip("torch", reason="slices are for PyTorch programs")

TRAIN = """\
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 10)).cuda()
ballast = torch.zeros(256, 1024, 1024, device="cuda:1")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(64, 512).cuda(), torch.randint(0, 10, (64,)).cuda()
for step in range(50):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
print("trained" if loss.item() < 2 else "not trained", torch.cuda.device_count())
"""


#: Makes the package one that does not have the function that the browser calls.
OLDER = """\
import jupyter_gpupool
def older(name):
    raise AttributeError(f"module 'jupyter_gpupool' has no attribute {name!r}")
jupyter_gpupool.__dict__.pop("_jupyter_gpupool_call", None)
jupyter_gpupool.__getattr__ = older
"""

#: What a notebook may ask for in its metadata.
ASKS: dict[str, object] = {
    "num_gpus": 1,
    "memory_mib": 24000,
    "filters": {"name": "V100", "emulated": "true"},
    "spread": True,
    "never_park": True,
    "require": False,
}


def notebook(folder: Path, name: str, *cells: str, **metadata: object) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    nbformat.write(
        new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=kernel | metadata), folder / name
    )


def tab(page: Page, name: str) -> Locator:
    return page.locator("#jp-main-dock-panel").get_by_role("tab", name=name)


class Screen:
    """JupyterLab with the panel open and two notebooks whose kernels run."""

    def __init__(self, page: Page, lab: Lab) -> None:
        self.page = page
        self.lab = lab
        notebook(lab.root, "train.ipynb", "before = 'still here'", TRAIN, "before")
        notebook(lab.root, "other.ipynb", "import torch; torch.cuda.device_count()")
        notebook(lab.root, "asks.ipynb", gpupool=ASKS)
        page.goto(lab.url.replace("/lab?", "/lab/tree/other.ipynb?"))
        expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
        page.get_by_role("listitem", name=re.compile("train.ipynb")).dblclick()
        expect(tab(page, "train.ipynb")).to_be_visible()
        page.get_by_role("tab", name="GPU Pool").click()
        self.panel = page.get_by_role("region", name="GPU Pool", exact=True)
        self.picker = self.panel.get_by_role("region", name="Request GPUs")
        self.cells = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell")

    def front(self, name: str) -> None:
        tab(self.page, name).click()
        expect(self.picker.get_by_role("button", name=name)).to_be_visible()

    def run(self, n: int) -> Locator:
        """Run a cell of the notebook in front; return its output."""
        return run_cell(self.page, self.cells.nth(n))

    def ran(self, n: int) -> None:
        """Run a cell of the notebook in front, and wait until it has ended.

        What the panel asks a kernel goes by a connection of its own, and may arrive before what was sent to it.
        """
        self.run(n)
        expect(self.cells.nth(n).locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]"))

    def choose(self, count: int, amount: float, unit: str = "fraction") -> None:
        self.picker.get_by_role("spinbutton", name="GPUs").fill(str(count))
        self.picker.get_by_role("combobox", name="Unit of the memory").select_option(unit)
        self.picker.get_by_role("spinbutton", name="of each").fill(str(amount))

    def lease(self, name: str) -> Locator:
        return self.panel.get_by_role("article", name=name)

    def saved(self, name: str) -> dict[str, object] | None:
        """Saves the notebook in front; what its metadata asks for."""
        self.page.keyboard.press("Control+s")
        expect(tab(self.page, name)).not_to_have_class(re.compile("jp-mod-dirty"))
        while True:
            try:
                metadata = json.loads((self.lab.root / name).read_text())["metadata"]
            except json.JSONDecodeError:  # the server writes a file in place
                self.page.wait_for_timeout(20)
            else:
                wish: dict[str, object] | None = metadata.get("gpupool")
                return wish

    def accept(self, button: str) -> None:
        self.page.get_by_role("dialog").get_by_role("button", name=button, exact=True).click()


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
    expect(screen.panel).to_contain_text("You hold no GPU slices.")
    expect(screen.panel.get_by_role("region", name="Queue")).to_have_count(0)


def test_two_gpus_at_eighty_percent_for_a_running_notebook(screen: Screen) -> None:
    screen.front("train.ipynb")
    screen.run(0)
    screen.choose(2, 0.8)
    expect(screen.picker).to_contain_text("2 × 26,008 MiB")
    expect(screen.picker).to_contain_text("Free now")
    screen.picker.get_by_label("Remember in the notebook").check()
    screen.picker.get_by_role("button", name="Attach to train.ipynb").click()
    lease = screen.lease("train.ipynb")
    expect(lease).to_contain_text("2 × 26,008 MiB: GPU 0, 1 of")
    expect(screen.picker).to_contain_text("train.ipynb already has GPU slices")
    for meter in screen.panel.get_by_role("meter", name="Granted memory of GPU").all():
        expect(meter).to_have_attribute("aria-valuenow", "26008")

    expect(screen.run(1)).to_contain_text("trained 2")
    expect(screen.run(2)).to_contain_text("still here")  # nothing was restarted
    expect(lease).to_contain_text(re.compile(r"1(\.\d)? of 50\.8 GiB used"))

    lease.get_by_role("button", name="Resize: train.ipynb").click()
    lease.get_by_role("spinbutton", name="New share of each GPU").fill("0.5")
    lease.get_by_role("button", name="Apply").click()
    expect(lease).to_contain_text("2 × 16,255 MiB: GPU 0, 1 of")
    expect(screen.run(2)).to_contain_text("still here")

    lease.get_by_role("button", name="Release: train.ipynb").click()
    screen.accept("Release")
    expect(lease).to_have_count(0)

    assert screen.saved("train.ipynb") == {"num_gpus": 2, "partial": 0.8}


def test_the_form_keeps_what_the_notebook_asks_for_and_the_user_does_not_touch(screen: Screen) -> None:
    wanted = dict(ASKS)
    screen.page.get_by_role("tab", name="File Browser").click()
    screen.page.get_by_role("listitem", name=re.compile("asks.ipynb")).dblclick()
    screen.page.get_by_role("tab", name="GPU Pool").click()
    lease = screen.lease("asks.ipynb")
    expect(screen.picker).to_contain_text("1 × 24,000 MiB")
    expect(screen.picker.get_by_role("textbox", name="Filters")).to_have_value("emulated=true")
    expect(screen.picker.get_by_label("Allow GPUs from several servers")).to_be_checked()
    expect(screen.picker.get_by_label("Remember in the notebook")).to_be_checked()
    screen.picker.get_by_role("button", name="Attach to asks.ipynb").click()
    expect(lease).to_contain_text("1 × 24,000 MiB: GPU 0 of")
    lease.get_by_role("button", name="Release: asks.ipynb").click()
    screen.accept("Release")
    expect(lease).to_have_count(0)
    assert screen.saved("asks.ipynb") == wanted

    screen.choose(1, 0.25)
    screen.picker.get_by_role("textbox", name="Filters").fill("index=1")
    screen.picker.get_by_role("button", name="Attach to asks.ipynb").click()
    expect(lease).to_contain_text("1 × 8,127 MiB: GPU 1 of")
    lease.get_by_role("button", name="Release: asks.ipynb").click()
    screen.accept("Release")
    expect(lease).to_have_count(0)
    del wanted["memory_mib"]
    wanted |= {"partial": 0.25, "filters": {"name": "V100", "index": "1"}}
    assert screen.saved("asks.ipynb") == wanted


def test_the_form_asks_in_mib_and_by_filters(screen: Screen) -> None:
    screen.front("other.ipynb")
    screen.choose(1, 0.5)
    unit = screen.picker.get_by_role("combobox", name="Unit of the memory")
    unit.select_option("MiB")
    amount = screen.picker.get_by_role("spinbutton", name="of each")
    expect(amount).to_have_value("16255")
    amount.fill("700")
    screen.picker.get_by_text("Filters", exact=True).click()
    filters = screen.picker.get_by_role("textbox", name="Filters")
    filters.fill("colour=red")
    expect(screen.picker).to_contain_text("unknown filter 'colour'")
    filters.fill("index=1")
    expect(screen.picker).to_contain_text("1 × 700 MiB")
    screen.picker.get_by_role("button", name="Attach to other.ipynb").click()
    lease = screen.lease("other.ipynb")
    expect(lease).to_contain_text("1 × 700 MiB: GPU 1 of")
    lease.get_by_role("button", name="Release: other.ipynb").click()
    screen.accept("Release")
    unit.select_option("fraction")
    expect(amount).to_have_value("0.02")


def test_a_kernel_with_an_older_package_is_to_be_restarted(screen: Screen) -> None:
    notebook(screen.lab.root, "older.ipynb", OLDER)
    screen.page.get_by_role("tab", name="File Browser").click()
    screen.page.get_by_role("listitem", name=re.compile("older.ipynb")).dblclick()
    screen.page.get_by_role("tab", name="GPU Pool").click()
    screen.front("older.ipynb")
    screen.ran(0)
    screen.choose(1, 0.5)
    screen.picker.get_by_role("button", name="Attach to older.ipynb").click()
    alert = screen.picker.get_by_role("alert")
    expect(alert).to_contain_text("an older version of jupyter_gpupool: restart the kernel and try again")
    expect(alert).not_to_contain_text("AttributeError")


def test_a_second_notebook_queues_and_is_granted(screen: Screen) -> None:
    screen.front("train.ipynb")
    screen.choose(2, 0.8)
    screen.picker.get_by_role("button", name="Attach to train.ipynb").click()
    first = screen.lease("train.ipynb")
    expect(first).to_be_visible()

    screen.front("other.ipynb")
    screen.choose(1, 0.5)
    expect(screen.picker).to_contain_text("Not free now: the request would be queued at position 1")
    screen.picker.get_by_role("button", name="Queue for other.ipynb").click()
    queue = screen.panel.get_by_role("region", name="Queue")
    expect(queue).to_contain_text("position 1 of 1")
    queue.get_by_role("button", name="Leave the queue: other.ipynb").click()
    expect(queue).to_have_count(0)

    screen.picker.get_by_role("button", name="Queue for other.ipynb").click()
    expect(queue).to_contain_text("position 1 of 1")
    first.get_by_role("button", name="Release: train.ipynb").click()
    screen.accept("Release")
    second = screen.lease("other.ipynb")
    expect(second).to_contain_text("1 × 16,255 MiB")
    expect(queue).to_have_count(0)
    expect(screen.run(0)).to_contain_text("1")
    second.get_by_role("button", name="Release: other.ipynb").click()
    screen.accept("Release")


def test_what_can_never_be_is_said_before_the_click(screen: Screen) -> None:
    screen.front("train.ipynb")
    screen.choose(3, 0.5)
    expect(screen.picker).to_contain_text("3 GPUs asked for, but the pool has 2")
    expect(screen.picker.get_by_role("button", name="Attach to train.ipynb")).to_be_disabled()
    screen.choose(1, 1.5)
    expect(screen.picker).to_contain_text("the fraction of a GPU must be above 0 and at most 1")
    screen.choose(1, 0.5)
    expect(screen.picker.get_by_role("button", name="Attach to train.ipynb")).to_be_enabled()


def test_slices_that_cannot_grow_stay_as_they_are_and_say_why(screen: Screen) -> None:
    screen.front("train.ipynb")
    screen.choose(1, 0.5)
    screen.picker.get_by_role("button", name="Attach to train.ipynb").click()
    lease = screen.lease("train.ipynb")
    lease.get_by_role("button", name="Resize: train.ipynb").click()
    lease.get_by_role("spinbutton", name="New share of each GPU").fill("2")
    lease.get_by_role("button", name="Apply").click()
    expect(lease.get_by_role("alert")).to_contain_text("at most 1")
    expect(lease).to_contain_text("1 × 16,255 MiB")
    lease.get_by_role("button", name="Release: train.ipynb").click()
    screen.accept("Release")


def attached(screen: Screen, name: str) -> Locator:
    """A notebook that has half a GPU; its lease."""
    screen.front(name)
    screen.choose(1, 0.5)
    screen.picker.get_by_role("button", name=f"Attach to {name}").click()
    lease = screen.lease(name)
    expect(lease).to_contain_text("1 × 16,255 MiB")
    return lease


def test_a_kernel_that_is_restarted_gives_its_slices_back_and_may_have_others(screen: Screen) -> None:
    lease = attached(screen, "other.ipynb")
    screen.page.get_by_role("button", name="Restart the kernel", exact=True).last.click()
    screen.accept("Confirm Kernel Restart")
    expect(lease).to_have_count(0)
    expect(screen.panel).to_contain_text("You hold no GPU slices.")
    attached(screen, "other.ipynb").get_by_role("button", name="Release: other.ipynb").click()
    screen.accept("Release")


def kernel_of(lab: Lab, name: str) -> psutil.Process:
    """The process that computes for a notebook."""
    answer = httpx.get(
        f"http://127.0.0.1:{lab.port}/api/sessions", params={"token": lab.TOKEN}, timeout=PATIENCE_S
    )
    (kernel,) = [session["kernel"]["id"] for session in answer.json() if session["path"] == name]
    (found,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(kernel in word for word in process.info["cmdline"] or [])
    ]
    return found


def test_a_kernel_that_dies_gives_its_slices_back(screen: Screen) -> None:
    lease = attached(screen, "other.ipynb")
    kernel_of(screen.lab, "other.ipynb").kill()
    screen.accept("Ok")  # JupyterLab says that it died, and starts another
    expect(lease).to_have_count(0)
    expect(screen.panel).to_contain_text("You hold no GPU slices.")


def test_two_windows_show_the_same_and_either_may_act(screen: Screen, window: Callable[[], Page]) -> None:
    other = window()
    other.goto(screen.lab.url.replace("/lab?", "/lab/workspaces/another?"))
    other.get_by_role("tab", name="GPU Pool", exact=True).click()
    theirs = other.get_by_role("region", name="GPU Pool", exact=True)
    expect(theirs).to_contain_text("You hold no GPU slices.")
    mine = attached(screen, "train.ipynb")
    seen = theirs.get_by_role("article", name="train.ipynb")
    expect(seen).to_contain_text("1 × 16,255 MiB")
    mine.get_by_role("button", name="Resize: train.ipynb").click()
    mine.get_by_role("spinbutton", name="New share of each GPU").fill("0.25")
    mine.get_by_role("button", name="Apply").click()
    expect(seen).to_contain_text("1 × 8,127 MiB")
    seen.get_by_role("button", name="Release: train.ipynb").click()
    other.get_by_role("dialog").get_by_role("button", name="Release", exact=True).click()
    expect(mine).to_have_count(0)
    expect(theirs).to_contain_text("You hold no GPU slices.")
    other.context.close()
