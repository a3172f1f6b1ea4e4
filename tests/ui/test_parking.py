"""A notebook is parked for another user's request and wakes at its next cell: what both see, and the Console."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from ..server.daemon.conftest import Server, initialised
from ..support.browser import run_cell
from .conftest import Lab
from .test_console import opened, see
from .test_slices import notebook

RECLAIM = (
    "--PoolService.reclaim=idle",
    "--PoolService.reclaim_after_s=0",
    "--PoolService.min_resident_s=0",
    "--LocalEngine.park_memory_mib=64",
)
PUT = "import torch; x = torch.arange(1000.0, device='cuda'); x.sum().item()"
GO_ON = "(x + 1).sum().item()"
ASLEEP = "asleep, wakes by itself"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A secured server that parks every idle lease for whoever waits."""
    made = initialised(tmp_path_factory.mktemp("server"), options=RECLAIM)
    made.start()
    yield made
    made.end()


class User:
    """Somebody's JupyterLab, with a notebook in front and the panel beside it."""

    def __init__(self, name: str, bundle: Path, built: Path, window: Callable[[], Page]) -> None:
        self.name = name
        self.home = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
        (self.home / "notebooks").mkdir()
        self.lab = Lab(self.home, self.home / "notebooks", built)
        self.lab.env["GPUPOOL_CONFIG_DIR"] = str(bundle)
        notebook(self.lab.root, f"{name}.ipynb", PUT, GO_ON)
        self.page = window()
        self.page.set_viewport_size({"width": 1400, "height": 1100})
        self.panel = self.page.get_by_role("region", name="GPU Pool", exact=True)
        self.lease = self.panel.get_by_role("article", name=f"{name}.ipynb", exact=True)
        self.status = self.page.locator("#jp-main-statusbar")

    def open(self) -> None:
        self.page.goto(self.lab.url.replace("/lab?", f"/lab/tree/{self.name}.ipynb?"))
        self.page.get_by_role("tab", name="GPU Pool").click()
        expect(self.page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()

    def attach(self) -> None:
        """Request both GPUs for the notebook."""
        self.panel.get_by_role("spinbutton", name="GPUs").fill("2")
        self.panel.get_by_role("spinbutton", name="of each").fill("1")
        self.panel.get_by_role("button", name=f"Attach to {self.name}.ipynb").click()
        expect(self.lease).to_be_visible()

    def run(self, n: int) -> Locator:
        """Run a cell; return its output."""
        return run_cell(self.page, self.page.locator(".jp-CodeCell").nth(n))

    def told(self, text: str) -> Locator:
        return self.page.locator(".Toastify__toast").filter(has_text=text)

    def end(self) -> None:
        self.page.context.close()
        self.lab.stop()
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture(scope="module")
def users(server: Server, window: Callable[[], Page], project_root: Path) -> Iterator[tuple[User, User]]:
    """Ada, and Bob, who administers the pool."""
    built = project_root / "jupyter_gpupool/labextension"
    with ExitStack() as stack:
        bundle = server.folder.parent / "ada"
        server.bundle(bundle, description="ada", owner="ada")
        ada, bob = (
            User(name, at, built, window) for name, at in (("ada", bundle), ("bob", server.folder / "admin"))
        )
        for user in (ada, bob):
            stack.callback(user.end)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda user: user.lab.start(), (ada, bob)))
        for user in (ada, bob):
            user.open()
        yield ada, bob


def test_a_notebook_is_parked_for_another_user_and_wakes_at_its_next_cell(
    users: tuple[User, User],
) -> None:
    ada, bob = users
    ada.attach()
    expect(ada.run(0)).to_contain_text("499500.0")
    bob.attach()
    expect(bob.run(0)).to_contain_text("499500.0")
    expect(ada.lease).to_contain_text(ASLEEP)
    expect(ada.status).to_contain_text(f"GPU: {ASLEEP}")
    expect(
        ada.told("ada.ipynb is asleep: it was idle, and its GPUs went to somebody who waited.")
    ).to_be_visible()
    expect(bob.status).to_contain_text("GPU 2 × 1")

    console = opened(bob.page)
    see(console, "Leases")
    row = console.get_by_role("row").filter(has_text="ada.ipynb")
    expect(row).to_contain_text(ASLEEP)
    see(console, "Audit")
    expect(console.get_by_role("row").filter(has_text="park").first).to_contain_text("kept in host memory")

    expect(ada.run(1)).to_contain_text("500500.0")
    expect(ada.status).to_contain_text("GPU 2 × 1")
    expect(ada.lease).not_to_contain_text(ASLEEP)
    expect(ada.told("ada.ipynb is asleep")).to_have_count(0)
    expect(bob.status).to_contain_text(f"GPU: {ASLEEP}")
    expect(bob.told("bob.ipynb is asleep")).to_be_visible()
