"""An administrator's Console: JupyterLab joined to a secured server with the administrator's bundle."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from jupyter_gpupool.client import bundle, requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.server.http.openapi.document import document
from jupyter_gpupool.transport.lifeline import Lifeline

from ..server.daemon.conftest import Server, initialised
from .accessible import THEMES, use_theme
from .conftest import Lab


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A secured server of two emulated GPUs."""
    made = initialised(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="module")
def admin_lab(server: Server, project_root: Path) -> Iterator[Lab]:
    home = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
    (home / "notebooks").mkdir()
    lab = Lab(home, home / "notebooks", project_root / "jupyter_gpupool/labextension")
    lab.env["GPUPOOL_CONFIG_DIR"] = str(server.folder / "admin")
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(home, ignore_errors=True)


def opened(page: Page) -> Locator:
    """The Console, by the palette."""
    page.keyboard.press("Control+Shift+C")
    page.get_by_role("textbox", name="SEARCH").fill("GPU Pool Console")
    page.get_by_role("menuitem", name="GPU Pool Console").click()
    console = page.get_by_role("tabpanel", name="GPU Pool Console", exact=True)
    expect(console.get_by_role("tab", name="Servers and health")).to_be_visible()
    return console


@pytest.fixture(scope="module")
def page(window: Callable[[], Page], admin_lab: Lab) -> Iterator[Page]:
    page = window()
    page.goto(admin_lab.url)
    expect(page.get_by_role("tab", name="Launcher")).to_be_visible()
    opened(page)
    yield page
    page.context.close()


@pytest.fixture
def console(page: Page) -> Locator:
    return page.get_by_role("tabpanel", name="GPU Pool Console", exact=True)


def see(console: Locator, view: str) -> Locator:
    console.get_by_role("tab", name=view).click()
    return console.get_by_role("tabpanel")


def described_calls() -> Iterator[str]:
    """The ids of all calls in the pool's OpenAPI document."""
    for item in document()["paths"].values():
        yield from (call["operationId"] for method, call in item.items() if method != "parameters")


def row(view: Locator, text: str) -> Locator:
    return view.get_by_role("row").filter(has_text=text)


def test_servers_and_health(page: Page, console: Locator, server: Server) -> None:
    view = see(console, "Servers and health")
    servers = view.get_by_role("table", name="GPU servers")
    expect(servers.get_by_role("row")).to_have_count(2)
    expect(servers).to_contain_text("2 × Tesla V100-PCIE-32GB emulated")
    servers.get_by_role("button", name="Drain:").click()
    question = page.get_by_role("dialog", name="Drain")
    expect(question).to_contain_text("It holds no GPU slices now.")
    question.get_by_role("button", name="Drain").click()
    expect(servers.get_by_text("draining")).to_be_visible()
    with server.administrator() as client:
        assert [there["draining"] for there in client.pool()["servers"]] == [True]
        servers.get_by_role("button", name="Use again:").click()
        page.get_by_role("dialog", name="Use").get_by_role("button", name="Use again").click()
        expect(servers.get_by_text("draining")).to_have_count(0)
        assert [there["draining"] for there in client.pool()["servers"]] == [False]
    health = view.get_by_role("region", name="Health")
    for check in ("ledger", "gpus", "engine", "disk", "memory"):
        expect(health.get_by_role("listitem").filter(has_text=check).first).to_be_visible()


def test_a_token_is_made_used_extended_and_revoked(
    page: Page, console: Locator, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = see(console, "Tokens")
    view.get_by_role("button", name="New token…").click()
    dialog = page.get_by_role("dialog", name="New token")
    dialog.get_by_role("button", name="Create and download").click()
    expect(dialog.get_by_role("alert")).to_contain_text("a token needs a description")
    dialog.get_by_label("Description").fill("grace's cluster")
    dialog.get_by_label("Owner").fill("grace")
    dialog.get_by_label("Valid").select_option("30 days")
    with page.expect_download() as waiting:
        dialog.get_by_role("button", name="Create and download").click()
    made = page.get_by_role("dialog", name="The token is made")
    expect(made).to_contain_text("cannot be had again")
    name = waiting.value.suggested_filename
    assert re.fullmatch(r"gpupool-[0-9a-f]{12}\.tar", name)
    expect(made).to_contain_text(f"tar -xf {name} -C ~/.gpupool")
    waiting.value.save_as(tmp_path / name)
    made.get_by_role("button", name="Done").click()

    with tarfile.open(tmp_path / name) as archive:
        members = {member.name: member.mode for member in archive.getmembers()}
        assert members == {"ca.crt": 0o600, "client.yaml": 0o600, "servers.conf": 0o600}
        archive.extractall(tmp_path / "theirs")
    monkeypatch.setenv("GPUPOOL_CONFIG_DIR", str(tmp_path / "theirs"))
    found = bundle.find()
    assert found is not None
    with PoolClient(found.urls[0], found.token, ca=found.ca) as client:
        request, _ = requests.new_request(partial=0.25, label="grace's notebook")
        lease = client.request(request, wait_s=30)
        assert lease.request.owner == "grace"

        leases = see(console, "Leases")
        mine = row(leases, "grace's notebook")
        expect(mine).to_contain_text("active")
        expect(mine).to_contain_text("1 × 8,127 MiB")
        mine.get_by_role("button", name="Release").click()
        question = page.get_by_role("dialog", name="Release the GPU slices of grace's notebook?")
        question.get_by_role("button", name="Keep").click()
        expect(mine).to_be_visible()
        mine.get_by_role("button", name="Release").click()
        question.get_by_role("button", name="Release and lose data").click()
        expect(mine).to_have_count(0)
        assert client.lease(lease.id).state.ended

    view = see(console, "Tokens")
    token = row(view, "grace's cluster")
    before = token.inner_text()
    token.get_by_role("button", name="Extend").click()
    question = page.get_by_role("dialog", name="Extend the token")
    question.get_by_label("Valid from now on").select_option("for ever")
    question.get_by_role("button", name="Extend").click()
    expect(token).to_contain_text("never")
    assert "never" not in before
    token.get_by_role("button", name="Revoke").click()
    page.get_by_role("dialog", name="Revoke the token").get_by_role("button", name="Revoke").click()
    expect(token).to_have_count(0)
    view.get_by_label("Show revoked tokens").check()
    expect(token).to_contain_text("revoked")


def test_leases_are_searched_sorted_and_extended(page: Page, console: Locator, server: Server) -> None:
    view = see(console, "Leases")
    with server.administrator() as client, ExitStack() as held:
        client.create_namespace("timed", {"limits": {"lease_s": 3600}})
        held.callback(client.delete_namespace, "timed")
        for label, partial in (("alpha", 0.1), ("beta", 0.3), ("gamma", 0.2)):
            namespace = "timed" if label == "gamma" else "default"
            request, _ = requests.new_request(partial=partial, label=label)
            lease = client.request(replace(request, namespace=namespace), wait_s=30)
            held.callback(client.release, lease.id)
        expect(view.get_by_role("button", name="Extend:")).to_have_count(1)
        view.get_by_role("button", name="Extend: gamma").click()
        dialog = page.get_by_role("dialog", name="Extend the lease of gamma")
        expect(dialog).to_contain_text("Its namespace, timed, allows 0 now.")
        dialog.get_by_role("button", name="Extend").click()
        expect(dialog.get_by_role("alert")).to_contain_text("timed")
        client.change_namespace("timed", {"limits": {"lease_s": 36000}})
        dialog.get_by_label("Minutes more").fill("120")
        dialog.get_by_role("button", name="Extend").click()
        expect(dialog).to_have_count(0)
        expires = client.lease(lease.id).expires_at
        assert lease.expires_at is not None and expires == pytest.approx(lease.expires_at + 7200)
        expect(row(view, "gamma")).to_contain_text("3 h")
        for alive in client.leases():
            client.heartbeat(alive.id)
        expect(view.get_by_text("3 in all")).to_be_visible()
        names = view.locator("[role=row] [role=cell]:nth-child(3)")
        view.get_by_role("button", name="Memory").click()
        expect(view.get_by_role("columnheader", name="Memory")).to_have_attribute("aria-sort", "ascending")
        expect(names).to_have_text(["alpha", "gamma", "beta"])
        view.get_by_role("button", name="Memory").click()
        expect(names).to_have_text(["beta", "gamma", "alpha"])
        view.get_by_role("searchbox").fill("GAM")
        expect(names).to_have_text(["gamma"])
        expect(view.get_by_text("1 of 3")).to_be_visible()
        view.get_by_role("searchbox").fill("")
    expect(view).to_contain_text("No leases and no queued requests.")


def test_a_namespace_with_limits_and_members(page: Page, console: Locator, server: Server) -> None:
    view = see(console, "Namespaces")
    view.get_by_role("button", name="New namespace…").click()
    dialog = page.get_by_role("dialog", name="New namespace")
    dialog.get_by_label("Name", exact=True).fill("vision")
    dialog.get_by_label("Memory in MiB").fill("-5")
    dialog.get_by_role("button", name="Create").click()
    expect(dialog.get_by_role("alert")).to_contain_text("memory_mib")
    dialog.get_by_label("Memory in MiB").fill("32510")
    dialog.get_by_label("Share of one user").fill("0.5")
    dialog.get_by_label("Idle leases while somebody waits").select_option("are parked")
    dialog.get_by_role("button", name="Add a member").click()
    dialog.get_by_label("Member 1", exact=True).fill("ada")
    dialog.get_by_label("Role of ada").select_option("administrator")
    dialog.get_by_role("button", name="Create").click()
    mine = row(view, "vision")
    expect(mine).to_contain_text("0 of 32,510")
    expect(mine).to_contain_text("50%")
    mine.get_by_role("button", name="Change").click()
    dialog = page.get_by_role("dialog", name="Namespace “vision”")
    expect(dialog.get_by_label("Member 1", exact=True)).to_have_value("ada")
    expect(dialog.get_by_label("Idle leases while somebody waits")).to_have_value("idle")
    dialog.get_by_label("Memory in MiB").fill("")
    dialog.get_by_label("Leases", exact=True).fill("3")
    dialog.get_by_role("button", name="Save").click()
    expect(mine).to_contain_text("0 of –")
    expect(mine).to_contain_text("0 of 3")
    audit = see(console, "Audit")
    expect(row(audit, "vision").first).to_be_visible()
    view = see(console, "Namespaces")
    row(view, "vision").get_by_role("button", name="Remove").click()
    question = page.get_by_role("dialog", name="Remove the namespace “vision”?")
    question.get_by_role("button", name="Remove").click()
    expect(row(view, "vision")).to_have_count(0)


def test_gpu_hours_by_user_and_by_namespace(console: Locator, server: Server) -> None:
    ada = server.client(server.token(owner="ada")["token"])
    ada.release(ada.request(requests.new_request(partial=0.1)[0], wait_s=60).id)
    view = see(console, "Usage")
    expect(row(view, "ada").first).to_be_visible()
    view.get_by_label("Rows").select_option("by namespace")
    expect(row(view, "default").first).to_be_visible()
    expect(row(view, "ada")).to_have_count(0)
    expect(view.get_by_role("link", name="Download as CSV")).to_have_attribute(
        "download", "gpu-hours-by-namespace.csv"
    )


def test_calls_are_described_with_their_parameters_and_objects(console: Locator) -> None:
    view = see(console, "API")
    calls = view.get_by_role("region", name="Calls")
    expect(calls.get_by_role("group")).to_have_count(len(list(described_calls())))
    view.get_by_label("Search calls").fill("request slices")
    expect(calls.get_by_role("group")).to_have_count(1)
    calls.get_by_text("POST /leases").click()
    expect(calls.get_by_role("table", name="Answers")).to_contain_text("202")
    expect(calls).to_contain_text("-X POST --json @body.json 'http://127.0.0.1:")
    calls.get_by_role("button", name="Request", exact=True).click()
    members = view.get_by_role("table", name="Request", exact=True)
    expect(members.get_by_role("row", name=re.compile("^num_gpus integer, ≥ 1, default 1"))).to_be_visible()
    expect(view.get_by_role("link", name="Download as OpenAPI document")).to_have_attribute(
        "download", "openapi.json"
    )


def test_it_is_there_again_after_a_reload(page: Page) -> None:
    page.reload()
    console = page.get_by_role("tabpanel", name="GPU Pool Console", exact=True)
    expect(console.get_by_role("table", name="GPU servers")).to_be_visible()


@pytest.mark.skipif(
    not os.environ.get("GPUPOOL_SCREENSHOTS"), reason="GPUPOOL_SCREENSHOTS=1 makes docs/console.png"
)
def test_screenshots(page: Page, console: Locator, server: Server, project_root: Path) -> None:
    with server.administrator() as client, ExitStack() as held:
        for label, count, partial in (
            ("train.ipynb", 2, 0.4),
            ("sweep.py", 1, 0.25),
            ("evaluate.ipynb", 1, 0.2),
        ):
            request, secret = requests.new_request(num_gpus=count, partial=partial, label=label)
            lease = requests.acquire(client, request)
            held.callback(Lifeline(requests.attach_spec(client, lease, secret, "remote")).release)
        hide = page.get_by_role("button", name="Hide notification")
        if hide.count():
            hide.first.click()
        view = see(console, "Servers and health")
        for theme, name in ((THEMES[0], "console.png"), (THEMES[1], "console-dark.png")):
            use_theme(page, theme)
            expect(view.get_by_role("table", name="GPU servers")).to_contain_text("4")
            page.screenshot(path=project_root / "docs" / name)
        use_theme(page, THEMES[0])
