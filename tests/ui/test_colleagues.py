"""Two users of one secured server, each in a JupyterLab of their own: who asks, who is warned, whose time ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from ..conftest import PATIENCE_S
from ..server.daemon.conftest import Server, initialised
from ..support.browser import run_cell
from .conftest import Lab
from .test_panel import tile
from .test_slices import notebook

#: Holds a slice, and computes nothing on it, until its standard input ends.
HOLDER = """
import jupyter_gpupool
lease = jupyter_gpupool.attach(partial={partial}, label={label!r})
print("attached", flush=True)
input()
"""
#: A cell that works for long, and not on a GPU.
LOADING = """\
import pathlib, time
while not pathlib.Path("loaded").exists():
    time.sleep(0.05)
print("all is loaded")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A secured server with a namespace whose members know each other, and whose leases last an hour."""
    made = initialised(tmp_path_factory.mktemp("server"))
    made.start()
    try:
        made.administrator().create_namespace("lab", {"names_holders": True, "limits": {"lease_s": 3600}})
        yield made
    finally:
        made.end()


class User:
    """Somebody's JupyterLab, joined to the server by their bundle."""

    def __init__(self, name: str, server: Server, built: Path, window: Callable[[], Page]) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
        (self.home / "notebooks").mkdir()
        server.bundle(self.home / "bundle", description=name, owner=name, namespace="lab")
        self.lab = Lab(self.home, self.home / "notebooks", built)
        self.lab.env["GPUPOOL_CONFIG_DIR"] = str(self.home / "bundle")
        self.page = window()
        self.page.set_viewport_size({"width": 1280, "height": 1400})  # only what is in sight is there
        self.panel = self.page.get_by_role("region", name="GPU Pool", exact=True)

    def set(self, **settings: object) -> None:
        kept = httpx.put(
            f"http://127.0.0.1:{self.lab.port}/lab/api/settings/jupyter-gpupool:plugin",
            headers={"Authorization": f"token {Lab.TOKEN}"},
            json={"raw": json.dumps(settings)},
            timeout=PATIENCE_S,
        )
        assert kept.status_code == 204, kept.text

    def open(self, path: str = "") -> None:
        """JupyterLab, and the panel in it."""
        self.page.goto(self.lab.url.replace("/lab?", f"/lab/tree/{path}?" if path else "/lab?"))
        self.page.get_by_role("tab", name="GPU Pool").click()

    def lease(self, name: str) -> Locator:
        return self.panel.get_by_role("article", name=name, exact=True)

    def told(self, text: str | re.Pattern[str]) -> Locator:
        """The notifications on the screen that say so."""
        return self.page.locator(".Toastify__toast").filter(has_text=text)

    def accept(self, title: str, button: str) -> None:
        dialog = self.page.get_by_role("dialog").filter(has_text=title)
        dialog.get_by_role("button", name=button, exact=True).click()
        expect(dialog).to_have_count(0)

    def end(self) -> None:
        self.page.context.close()
        self.lab.stop()
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture(scope="module")
def users(server: Server, window: Callable[[], Page], project_root: Path) -> Iterator[tuple[User, User]]:
    """Ada, who holds one GPU by a program, and two slices of the other; and Bob, who looks at the pool."""
    built = project_root / "jupyter_gpupool/labextension"
    with ExitStack() as stack:
        ada, bob = (User(name, server, built, window) for name in ("ada", "bob"))
        for user in (ada, bob):
            stack.callback(user.end)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda user: user.lab.start(), (ada, bob)))
        # A quarter of a GPU, which counts as a half: some seconds after the pool tells that it is idle.
        ada.set(idleMinutes=0.28)
        notebook(ada.lab.root, "loads.ipynb", LOADING)
        ada.open("loads.ipynb")
        ada.panel.get_by_role("spinbutton", name="of each").fill("0.25")
        ada.panel.get_by_role("button", name="Attach to loads.ipynb").click()
        expect(ada.lease("loads.ipynb")).to_be_visible()
        run_cell(ada.page, ada.page.locator(".jp-CodeCell"))
        # It does not compute for longer than the others: the first to be warned of, if it were.
        programs = []
        for label, partial in (("a sweep", 1.0), ("forgotten", 0.25)):
            programs.append(ada.lab.run(HOLDER.format(partial=partial, label=label)))
            stack.callback(ended, programs[-1])
        bob.open()
        for program in programs:
            assert program.stdout is not None and program.stdout.readline() == "attached\n"
        yield ada, bob


def ended(program: subprocess.Popen[str]) -> None:
    program.communicate("\n", timeout=300)


def test_time_is_left_and_can_be_extended_as_far_as_the_namespace_allows(
    users: tuple[User, User], server: Server
) -> None:
    ada, _ = users
    sweep = ada.lease("a sweep")
    expect(sweep).to_contain_text(re.compile(r"5\d min left"))

    def extend(minutes: int, said: str) -> None:
        sweep.get_by_role("button", name="Extend: a sweep").click()
        dialog = ada.page.get_by_role("dialog")
        expect(dialog).to_contain_text(said)
        dialog.get_by_role("spinbutton").fill(str(minutes))
        ada.accept("Extend the lease of a sweep", "Extend")

    extend(30, "Minutes; now at most ")
    refused = "leases of the namespace 'lab' last 1 h at most, counted from now"
    expect(sweep.get_by_role("alert")).to_contain_text(refused)
    server.administrator().change_namespace("lab", {"limits": {"lease_s": 7200}})
    extend(30, "Minutes; now at most 6")
    expect(sweep).to_contain_text("1.5 h left")
    expect(sweep.get_by_role("alert")).to_have_count(0)


def test_who_has_little_time_left_is_told_and_has_more_by_a_click(
    users: tuple[User, User], window: Callable[[], Page]
) -> None:
    ada, _ = users
    page = window()
    # An hour and a half of which 81 minutes have passed, by the clock of the page.
    page.add_init_script("{ const now = Date.now; Date.now = () => now.call(Date) + 4_860_000; }")
    page.goto(ada.lab.url)
    near = page.locator(".Toastify__toast").filter(
        has_text=re.compile(r"The GPUs of a sweep go back to the pool in \d min\.")
    )
    near.get_by_role("button", name="More time…").click()
    dialog = page.get_by_role("dialog").filter(has_text="Extend the lease of a sweep")
    dialog.get_by_role("spinbutton").fill("15")
    dialog.get_by_role("button", name="Extend", exact=True).click()
    expect(near).to_have_count(0)  # it is true no longer
    page.context.close()


def test_a_slice_that_does_not_compute_is_warned_of_unless_a_cell_runs(users: tuple[User, User]) -> None:
    ada, _ = users
    warning = ada.told("forgotten has not used its GPUs for")
    expect(warning).to_have_count(1, timeout=300_000)
    loads = ada.lease("loads.ipynb")
    expect(loads).to_contain_text("idle")  # for longer, and the user sees it
    assert ada.told("loads.ipynb has not used its GPUs").count() == 0

    expect(ada.lease("forgotten")).to_contain_text("idle")
    warning.get_by_role("button", name="Keep").click()
    expect(ada.lease("forgotten")).not_to_contain_text("idle")
    expect(warning).to_have_count(0)

    (ada.lab.root / "loaded").touch()
    expect(ada.page.locator(".jp-OutputArea")).to_contain_text("all is loaded")
    warning = ada.told("loads.ipynb has not used its GPUs for")
    expect(warning).to_have_count(1)
    warning.get_by_role("button", name="Release").click()
    ada.accept("Release the GPU slices of loads.ipynb?", "Release")
    expect(loads).to_have_count(0)
    expect(warning).to_have_count(0)


def test_a_colleague_asks_for_a_gpu_and_gets_it(users: tuple[User, User]) -> None:
    ada, bob = users
    expect(tile(bob.panel, "GPUs free")).to_have_text("0 of 2")
    whole = bob.panel.locator("[role=meter][aria-valuenow='32510']")
    expect(whole).to_have_count(1)
    piece = whole.locator(".jp-GPUPool-piece")
    piece.hover()
    expect(piece).to_have_attribute("title", re.compile(r"^ada\n"))
    held = bob.panel.get_by_role("region", name="Held by others")
    sweep = held.get_by_role("article", name="ada").filter(has_text="31.7 GiB")
    sweep.get_by_role("button", name="Ask ada to release").click()
    bob.page.get_by_role("dialog").get_by_role("textbox").fill("for an hour, please")
    bob.accept("Ask ada to release these GPU slices?", "Ask")
    expect(bob.told("Your message was sent to ada.")).to_be_visible()

    asked = ada.told("bob asks you to release the GPU slices of a sweep: “for an hour, please”")
    expect(asked).to_be_visible()
    expect(ada.lease("a sweep")).to_contain_text("bob asks you to release it: “for an hour, please”")
    asked.get_by_role("button", name="Release").click()
    ada.accept("Release the GPU slices of a sweep?", "Release and lose data")
    expect(ada.lease("a sweep")).to_have_count(0)

    expect(sweep).to_have_count(0)
    expect(whole).to_have_count(0)
    expect(tile(bob.panel, "GPUs free")).to_have_text("1 of 2")


def test_the_settings_editor_has_a_form_for_it(users: tuple[User, User]) -> None:
    page = users[1].page
    page.keyboard.press("Control+,")
    page.locator(".jp-PluginList").get_by_text("GPU Pool", exact=True).click()
    form = page.locator(".jp-SettingsForm").get_by_role("group", name="GPU Pool")
    for name, value in (("numGpus", "1"), ("partial", "0.5"), ("refresh", "1"), ("idleMinutes", "30")):
        expect(form.locator(f"input[id$='plugin_{name}']")).to_have_value(value)
    expect(form.locator("select[id$='plugin_units']").locator("option")).to_have_text(["auto", "MiB", "GiB"])
    expect(form.locator("select[id$='plugin_chartRange']")).to_be_visible()
    status = page.get_by_role("contentinfo").get_by_role("button", name=re.compile("Open the GPU pool"))
    expect(status).to_be_hidden()
    form.locator("select[id$='plugin_statusBar']").select_option("always")
    expect(status).to_contain_text("GPU: none held")
