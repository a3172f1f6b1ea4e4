"""A day at a hub: users choose slices on the spawn page, train at once, wait, and give back; nothing is lent twice."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Page, expect

from jupyter_gpupool.core.errors import PoolError

from ..support.browser import browser, jp_asyncio_loop, jp_server_cleanup, run_cell, window  # noqa: F401  # fixtures
from ..support.processes import runs
from .running import PASSWORD, Hub

#: They share three emulated GPUs, and go on when the hub does not.
MORE = "c.JupyterHub.cleanup_servers = False\nc.JupyterHub.cleanup_proxy = False"

TRAIN = """\
import torch
from torch import nn
torch.manual_seed(0)
devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
models = [nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(d) for d in devices]
x, y = torch.randn(64, 64), torch.randint(0, 10, (64,))
for model, device in zip(models, devices):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
gib = torch.cuda.mem_get_info(0)[1] >> 20
print("trained on", len(devices), "of", gib, "MiB")
"""


@pytest.fixture(scope="module")
def hub(new_hub: Callable[..., Hub]) -> Hub:
    made = new_hub(MORE, limits={"max_gpus": 3}, options=["--LocalEngine.emulated_count=3"])
    for user in ("alice", "bob", "carol"):
        home = made.folder / "home" / user
        home.mkdir(parents=True)
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=[new_code_cell(TRAIN)], metadata=kernel), home / "train.ipynb")
    made.start()
    return made


@pytest.fixture
def watch(hub: Hub) -> Iterator[Callable[[], None]]:
    """Looks all the time whether more of a GPU is granted than it has; call it to hear what it saw."""
    over, wrong, looks = threading.Event(), [], []

    def look() -> None:
        pool = hub.pool()
        while not over.wait(0.2):
            try:
                said = pool.pool()
            except PoolError:
                continue  # it is being started again
            looks.append(1)
            for server in said["servers"]:
                for gpu in server["gpus"]:
                    if sum(s["memory_mib"] for s in gpu["slices"]) > gpu["memory_mib"]:
                        wrong.append(gpu)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: None if looks and not wrong else pytest.fail(f"{len(looks)} looks; lent twice: {wrong}")
    finally:
        over.set()
        thread.join()


class User:
    """Somebody in a window of their own."""

    def __init__(self, hub: Hub, name: str, page: Page) -> None:
        self.hub, self.name, self.page = hub, name, page
        page.goto(f"{hub.url}/hub/login")
        page.locator("#username_input").fill(name)
        page.locator("#password_input").fill(PASSWORD)
        page.locator("#login_submit").click()
        page.wait_for_url("**/hub/**")
        self.form = page.get_by_role("group", name="Request GPUs")

    def choose(self, count: int, share: float) -> None:
        self.page.goto(f"{self.hub.url}/hub/spawn")
        self.form.get_by_label("GPU slices", exact=True).select_option(str(count))
        self.form.get_by_label("Share of each GPU's memory").fill(str(share))

    def start(self) -> None:
        self.page.get_by_role("button", name="Start").click()

    def train(self) -> None:
        self.page.goto(f"{self.hub.url}/user/{self.name}/lab/tree/train.ipynb")
        expect(self.page.get_by_text(re.compile(r"Python 3.*\| Idle"))).to_be_visible(timeout=300_000)
        run_cell(self.page, self.page.locator(".jp-CodeCell").first)

    def trained(self, count: int, mib: int) -> None:
        output = self.page.locator(".jp-CodeCell .jp-OutputArea").first
        expect(output).to_contain_text(f"trained on {count} of {mib} MiB", timeout=300_000)

    def pools_page(self) -> Page:
        page = self.page.context.new_page()
        page.goto(f"{self.hub.url}/services/gpupool/")
        expect(page.get_by_role("heading", name="GPU pool")).to_be_visible()
        return page


def test_a_day_at_the_hub(
    hub: Hub,
    window: Callable[[], Page],  # noqa: F811
    watch: Callable[[], None],
    eventually: Callable[..., Any],
) -> None:
    alice, bob, carol = (User(hub, name, window()) for name in ("alice", "bob", "carol"))

    # Each sees, before choosing, what a choice means and whether it can be had.
    alice.choose(1, 0.5)
    expect(alice.form).to_contain_text("emulated")
    expect(alice.form.get_by_role("status")).to_have_text(
        "1 × 16,255 MiB of a Tesla V100-PCIE-32GB (emulated): free now"
    )
    alice.start()
    eventually(lambda: hub.leases() == {"alice": "ACTIVE"}, "alice's lease")
    bob.choose(2, 0.8)
    expect(bob.form.get_by_role("status")).to_contain_text("26,008 MiB")
    bob.start()
    eventually(lambda: hub.leases() == {"alice": "ACTIVE", "bob": "ACTIVE"}, "bob's, too")

    # Too much: by the form it cannot be sent; by a form that was tampered with, it is refused on that form.
    carol.choose(3, 1.0)
    expect(carol.form.get_by_role("status")).to_contain_text("you would wait")
    carol.page.evaluate("document.querySelector('[name=gpupool_num_gpus] option:checked').value = '40'")
    carol.start()
    expect(carol.page.locator(".spawn-error-msg")).to_contain_text(
        "40 GPUs were chosen; this hub lends at most 3"
    )
    assert "carol" not in hub.leases()
    assert hub.server("carol") is None
    carol.choose(1, 6)
    expect(carol.form.get_by_role("status")).to_have_text("choose a share from 0.05 to 1")
    carol.choose(1, 0.6)
    expect(carol.form.get_by_role("status")).to_contain_text("you would wait")
    carol.start()
    expect(carol.page.locator("#progress-message, #progress-details").first).to_contain_text(
        "position 1 in the queue"
    )
    assert hub.leases()["carol"] == "QUEUED"

    # They train at the same time.
    for user in (alice, bob):
        eventually(lambda user=user: hub.ready(user.name), f"{user.name}'s server")
    alice.train()
    bob.train()
    alice.trained(1, 16255)
    bob.trained(2, 26008)
    watch()

    # Nobody sees another's; the administrator sees all.
    mine = alice.pools_page()
    expect(mine.get_by_role("row")).to_have_count(3 + 1 + 1 + 1)
    expect(mine.get_by_role("cell", name="alice")).to_be_visible()
    expect(mine.get_by_role("cell", name="bob")).to_have_count(0)
    root = User(hub, "root", window()).pools_page()
    for name in ("alice", "bob", "carol"):
        expect(root.get_by_role("cell", name=name)).to_be_visible()

    # One stops, and the one who waited has it.
    alice.page.goto(f"{hub.url}/hub/home")
    alice.page.get_by_role("button", name="Stop My Server").click()
    eventually(lambda: hub.leases() == {"bob": "ACTIVE", "carol": "ACTIVE"}, "carol has her turn")
    eventually(lambda: hub.ready("carol"), "carol's server")
    carol.train()
    carol.trained(1, 19506)

    # A server is killed.
    hub.process_of("bob").kill()
    eventually(lambda: hub.leases() == {"carol": "ACTIVE"}, "what bob had is free")
    eventually(lambda: hub.server("bob") is None, "the hub has noticed")

    # The service ends in the worst way, and then the hub: carol goes on with the slice that she has.
    (before,) = hub.pool().leases()
    service = hub.service()
    service.send_signal(signal.SIGKILL)
    eventually(lambda: not runs(service), "it is gone")
    eventually(lambda: hub.answers() and hub.leases(), "the service is back")
    assert hub.leases() == {"carol": "ACTIVE"}
    hub.stop()
    hub.start()
    (after,) = hub.pool().leases()
    assert (after.id, after.worker, after.slices) == (before.id, before.worker, before.slices)
    run_cell(carol.page, carol.page.locator(".jp-CodeCell").first)
    expect(carol.page.locator(".jp-InputPrompt").first).to_have_text("[2]:", timeout=300_000)
    carol.trained(1, 19506)

    # Nothing is left.
    hub.stop_server("carol")
    eventually(lambda: not hub.leases(), "the last one is given back")
    eventually(lambda: not runs(after.worker.pid), "its worker is gone")
    watch()
