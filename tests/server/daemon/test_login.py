"""`gpupool login` at a real OpenID provider, by a device code and by a browser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from jupyter_gpupool.cli import login
from jupyter_gpupool.client import bundle, login_file, pool_finder, requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.client.sign_in import FreshToken
from jupyter_gpupool.core.errors import InvalidRequest, Unauthenticated
from jupyter_gpupool.jupyter.pool_backend import GPUPool

from ...support import oidc_provider
from ...support.oidc_provider import OpenIDProvider, log_in
from ...support.ports import free_port
from ...support.secret_service import secret_service
from .conftest import COMMAND, Server, gpupool, initialised


@dataclass
class Setup:
    provider: OpenIDProvider
    server: Server


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    parent = tmp_path_factory.mktemp("login")
    server = initialised(parent)
    provider = OpenIDProvider(
        parent,
        free_port(),
        *(server.folder / name for name in ("server.crt", "server.key", "ca.crt")),
        groups={"ada": ["ml"], "bob": ["ops"]},
    )
    provider.start()
    issuer = {
        "issuer": provider.issuer,
        "audience": "gpupool",
        "clients": ["gpupool"],
        "ca_file": str(provider.ca),
        "client_id": "gpupool",
        "login_parameters": {"resource": "urn:pool"},
        "max_age_s": 600,
        "grants": [
            {"claims": {"groups": "ml"}, "namespace": "ml"},
            {"claims": {"groups": "ops"}, "administers": True},
        ],
    }
    with (server.folder / "gpupool_config.py").open("a") as configuration:
        configuration.write(f"\nc.OIDC.issuers = [{issuer!r}]\n")
    server.start()
    server.administrator().create_namespace("ml", {})
    yield Setup(provider, server)
    server.end()
    provider.stop()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a user's login is kept; there is no browser."""
    folder = tmp_path / "home"
    monkeypatch.setenv(bundle.VARIABLE, str(folder))
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    return folder


def by_device(setup: Setup, user: str, *words: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "login", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"Open (https://\S+) and confirm the code ([A-Z]{4}-[A-Z]{4})", line)
    assert found, line + process.stderr.read()
    assert found[2] in found[1]
    assert "Success" in log_in(found[1], user, setup.provider.trusted)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.startswith(f"Logged in as {user}")


def kept(home: Path) -> login_file.Login:
    found = login_file.load(home / login_file.NAME)
    assert found is not None
    return found


def age(home: Path) -> login_file.Login:
    """Make the login as old as it is after an hour."""
    text = json.loads((home / login_file.NAME).read_text())
    text["issued_at"] -= 3600
    (home / login_file.NAME).write_text(json.dumps(text))
    return kept(home)


def test_by_a_device_code_without_a_bundle(setup: Setup, home: Path, tmp_path: Path) -> None:
    address = setup.server.url.removeprefix("https://")
    by_device(setup, "ada", address, "--ca", str(setup.server.folder / "ca.crt"))
    file = home / login_file.NAME
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(home.stat().st_mode) == 0o700
    who = json.loads(gpupool("whoami", "--json").stdout)
    assert who["owner"] == "ada" and who["namespaces"] == {"default": "use", "ml": "use"}
    assert "ml: use" in gpupool("whoami").stdout
    ran = gpupool("run", "-p", "0.1", "--", sys.executable, "-c", "print('computed')")
    assert ran.returncode == 0 and ran.stdout == "computed\n", ran.stderr
    for secret in (kept(home).access_token, kept(home).refresh_token):
        assert secret not in setup.server.log and secret.rpartition(".")[2] not in setup.server.log
    before = kept(home).refresh_token
    assert gpupool("logout").stdout == "Logged out\n" and not file.exists()
    with setup.provider.http() as http:
        form = {"grant_type": "refresh_token", "client_id": "gpupool", "refresh_token": before}
        assert http.post("/token", data=form).json()["error"] == "invalid_grant"
    assert gpupool("logout").stdout == "You are not logged in\n"


def test_a_login_in_the_systems_keyring(setup: Setup, home: Path, tmp_path: Path) -> None:
    address = setup.server.url.removeprefix("https://")
    file = home / login_file.NAME
    with secret_service(tmp_path / "keyrings"):
        by_device(setup, "ada", address, "--ca", str(setup.server.folder / "ca.crt"), "--keyring")
        written = json.loads(file.read_text())
        assert written["keyring"].startswith(setup.server.url)
        assert written["access_token"] == written["refresh_token"] == ""
        assert json.loads(gpupool("whoami", "--json").stdout)["owner"] == "ada"
        assert gpupool("logout").stdout == "Logged out\n" and not file.exists()
        find = [sys.executable, "-m", "keyring", "get", "jupyter_gpupool", written["keyring"]]
        assert subprocess.run(find, capture_output=True, text=True).stdout == ""


def test_by_a_browser_with_a_bundle(setup: Setup, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle has the servers, and its token is used again after the logout."""
    made = setup.server.bundle(home, owner="static")
    program = f"{sys.executable} {oidc_provider.__file__} bob {setup.provider.ca} %s &"
    monkeypatch.setenv("BROWSER", program)
    done = gpupool("login")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Logged in as bob, an administrator\n"
    assert json.loads(gpupool("whoami", "--json").stdout)["administers"]
    assert gpupool("logout").returncode == 0
    assert json.loads(gpupool("whoami", "--json").stdout)["owner"] == made["owner"]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", (), False),
        ("linux", ("DISPLAY",), True),
        ("linux", ("WAYLAND_DISPLAY",), True),
        ("linux", ("DISPLAY", "SSH_CONNECTION"), False),
        ("darwin", (), True),
        ("darwin", ("SSH_CONNECTION",), False),
        ("win32", (), True),
    ],
)
def test_a_browser_is_opened_where_its_user_sees_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, platform: str, variables: tuple[str, ...], expected: bool
) -> None:
    monkeypatch.setattr(webbrowser, "get", lambda: None)  # there is one
    monkeypatch.setattr(sys, "platform", platform)
    for name in variables:
        monkeypatch.setenv(name, "set")
    assert login._has_browser() is expected


def test_a_token_is_refreshed_once_by_whoever_notices_first(setup: Setup, home: Path) -> None:
    by_device(setup, "ada", setup.server.url, "--ca", str(setup.server.folder / "ca.crt"), "--device")
    client, _ = pool_finder.find_pool()
    with client:
        request, _ = requests.new_request(partial=0.1)
        lease = client.request(request)
        assert lease.request.namespace == "ml"
        old = age(home)
        with ThreadPoolExecutor(8) as many:
            tokens = list(many.map(lambda _: FreshToken(str(home / login_file.NAME)).get(), range(8)))
        assert len(set(tokens)) == 1 and tokens[0] != old.access_token
        assert kept(home).refresh_token != old.refresh_token
        same = PoolClient(**client.settings())  # as the process that keeps a lease makes it
        assert (
            same.heartbeat(lease.id).id == lease.id and same.headers["Authorization"] == f"Bearer {tokens[0]}"
        )
        same.close()
        client.release(lease.id)


def test_while_the_provider_is_down_the_old_token_is_used_and_a_login_says_so(
    setup: Setup, home: Path
) -> None:
    by_device(setup, "ada", setup.server.url, "--ca", str(setup.server.folder / "ca.crt"))
    setup.provider.stop()
    try:
        old = age(home)
        assert FreshToken(str(home / login_file.NAME)).get() == old.access_token
        again = gpupool("login")
        assert again.returncode == 1 and f"{setup.provider.issuer} does not answer" in again.stderr
        out = gpupool("logout")
        assert out.returncode == 1 and "logged out here, but not at the identity provider" in out.stderr
    finally:
        setup.provider.start()
    with pytest.raises(Unauthenticated, match="log in again"):
        FreshToken(str(home / login_file.NAME)).get()


def test_what_cannot_be_logged_in_at(setup: Setup, home: Path, own_server: Server) -> None:
    for words, said, code in (
        ((), "which server?", 2),
        (("https://localhost/pool",), "no address of a server", 2),
        (("localhost", "--ca", str(home / "nothing")), "cannot read", 2),
        ((own_server.url, "--ca", str(own_server.folder / "ca.crt")), "no such identity provider", 1),
        (
            (setup.server.url, "--ca", str(setup.server.folder / "ca.crt"), "--issuer", "https://x"),
            "no such identity provider",
            1,
        ),
    ):
        done = gpupool("login", *words)
        assert done.returncode == code and said in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"servers": 1}'])
def test_a_broken_login_says_what_to_do(home: Path, text: str) -> None:
    home.mkdir()
    (home / login_file.NAME).write_text(text)
    with pytest.raises(InvalidRequest, match=r"gpupool logout, gpupool login"):
        bundle.find()


def test_a_jupyter_server_uses_the_login_of_its_user(setup: Setup, home: Path) -> None:
    setup.server.bundle(home, owner="static")
    by_device(setup, "ada")

    async def owner() -> str:
        pool = GPUPool()
        await pool.start()
        try:
            return str((await pool.tenants.whoami("jupyter", "default"))["owner"])
        finally:
            await pool.stop()

    assert asyncio.run(owner()) == "ada"
