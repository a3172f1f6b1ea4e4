"""A login whose tokens are in the system's keyring: a real one, and those that are none."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jupyter_gpupool.client import login_file, sign_in, system_keyring
from jupyter_gpupool.client.bundle import VARIABLE, find
from jupyter_gpupool.core.errors import InvalidRequest, Unauthenticated

from ..support.secret_service import secret_service
from .test_sign_in import OFFERED, OLD, Provider

keyring = pytest.importorskip("keyring", reason="the extra keyring is not installed")


@pytest.fixture(autouse=True)
def chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps the keyring that it has chosen first."""
    monkeypatch.setattr(keyring.core, "_keyring_backend", None)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    with secret_service(tmp_path / "keyrings") as daemon:
        monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.SecretService.Keyring")
        yield daemon


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    made = Provider()
    made.answers.set()
    monkeypatch.setattr(sign_in, "IdentityProvider", made)
    return made


def log_in(path: Path, server: str = OLD.servers[0], in_keyring: bool = True) -> login_file.Login:
    shown = lambda *_: None  # noqa: E731
    return sign_in.sign_in(OFFERED, (server,), "", path, show=shown, keyring=in_keyring)


def test_tokens_are_in_the_keyring_alone(
    service: object, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "home" / login_file.NAME
    login = log_in(path)
    text = path.read_text()
    assert login.access_token not in text and login.refresh_token not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert login_file.load(path) == login
    assert json.loads(system_keyring.get(login.keyring) or "")["refresh_token"] == "third"
    monkeypatch.setenv(VARIABLE, str(path.parent))
    found = find()
    assert found is not None and found.login == str(path)


def test_a_refreshed_token_goes_there_too(service: object, provider: Provider, tmp_path: Path) -> None:
    path = tmp_path / login_file.NAME
    login = log_in(path)
    login_file.save(path, replace(login, expires_at=0.0))
    assert sign_in.FreshToken(str(path)).get() == "refreshed"
    written = json.loads(path.read_text())
    assert written["access_token"] == written["refresh_token"] == ""
    kept = login_file.load(path)
    assert kept is not None and (kept.access_token, kept.refresh_token) == ("refreshed", "second")


def test_each_pool_has_an_entry_and_a_logout_deletes_its_own(
    service: object, provider: Provider, tmp_path: Path
) -> None:
    one, other = tmp_path / "one" / login_file.NAME, tmp_path / "other" / login_file.NAME
    first, second = log_in(one), log_in(other, "https://gpus.example:56001")
    assert first.keyring != second.keyring
    assert sign_in.sign_out(one) == first and provider.revoked == ["third"]
    assert system_keyring.get(first.keyring) is None and not one.exists()
    assert login_file.load(other) == second
    with pytest.raises(Unauthenticated, match="log in again"):
        sign_in.FreshToken(str(one)).get()


@pytest.mark.parametrize("in_keyring", [False, True])
def test_a_new_login_leaves_nothing_of_the_former(
    service: object, provider: Provider, tmp_path: Path, in_keyring: bool
) -> None:
    path = tmp_path / login_file.NAME
    former = log_in(path)
    login = log_in(path, "https://gpus.example:56001", in_keyring)
    assert system_keyring.get(former.keyring) is None
    assert login_file.load(path) == login and bool(login.keyring) == in_keyring


def test_an_entry_that_was_deleted_elsewhere_is_a_logout(
    service: object, provider: Provider, tmp_path: Path
) -> None:
    path = tmp_path / login_file.NAME
    system_keyring.delete(log_in(path).keyring)
    with pytest.raises(Unauthenticated, match="log in again"):
        sign_in.FreshToken(str(path)).get()
    assert sign_in.sign_out(path) is None and not path.exists()


def test_without_its_keyring_a_login_stays_and_says_why(
    service: subprocess.Popen[str], provider: Provider, tmp_path: Path
) -> None:
    path = tmp_path / login_file.NAME
    log_in(path)
    service.kill()
    service.wait()
    for use in (login_file.load, sign_in.sign_out):
        with pytest.raises(InvalidRequest, match="^the system's keyring cannot be used") as caught:
            use(path)
        assert "\n" not in str(caught.value)
    assert path.exists(), "the tokens are still there, and so is the way to them"


@pytest.mark.parametrize("name", ["fail", "null"])
def test_a_keyring_that_keeps_nothing_is_refused_before_the_login(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", f"keyring.backends.{name}.Keyring")
    with pytest.raises(InvalidRequest, match="no keyring to keep a login in") as caught:
        log_in(tmp_path / login_file.NAME)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_plain_file_is_no_keyring_even_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from keyring.backends import chainer, fail

    class PlaintextKeyring(fail.Keyring):  # type: ignore[misc, valid-type]
        pass

    class Protected(fail.Keyring):  # type: ignore[misc, valid-type]
        pass

    class Chain(chainer.ChainerBackend):  # type: ignore[misc, valid-type]
        backends = [PlaintextKeyring()]

    PlaintextKeyring.__module__ = "keyrings.alt.file"
    for only in (PlaintextKeyring(), Chain()):
        monkeypatch.setattr(keyring.core, "_keyring_backend", only)
        with pytest.raises(InvalidRequest, match="no keyring to keep a login in"):
            system_keyring.backend()
    Chain.backends = [PlaintextKeyring(), Protected()]
    monkeypatch.setattr(keyring.core, "_keyring_backend", Chain())
    assert isinstance(system_keyring.backend(), Protected)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'jupyter_gpupool\[keyring\]'"):
        system_keyring.backend()
