"""A login's file while several processes use it: a logout and a new login are the last word."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.client import login_file, sign_in
from jupyter_gpupool.client.identity_provider import _Callback
from jupyter_gpupool.client.login_file import Login

OLD = Login(
    servers=("https://localhost:1",),
    ca="",
    issuer="https://localhost:2",
    issuer_ca="",
    client_id="gpupool",
    token_endpoint="https://localhost:2/token",
    revocation_endpoint="https://localhost:2/revoke",
    access_token="old",
    issued_at=0.0,
    expires_at=0.0,
    refresh_token="first",
)
OFFERED = {
    "issuers": [
        {
            "issuer": OLD.issuer,
            "client_id": "gpupool",
            "ca": "",
            "parameters": {},
            "scopes": "openid",
            "max_age_s": None,
        }
    ]
}


class Provider:
    """Answers a refresh only when the test says so."""

    def __init__(self) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()
        self.revoked: list[str] = []

    def __call__(self, *_: Any) -> Provider:
        return self

    def __enter__(self) -> Provider:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def refresh(self, endpoint: str, token: str) -> dict[str, Any]:
        self.asked.set()
        self.answers.wait()
        return {"access_token": "refreshed", "refresh_token": "second"}

    def revoke(self, endpoint: str, token: str) -> None:
        self.revoked.append(token)

    def discover(self) -> dict[str, Any]:
        return {"token_endpoint": OLD.token_endpoint, "revocation_endpoint": OLD.revocation_endpoint}

    def by_device(self, *_: Any) -> dict[str, Any]:
        return {"access_token": "of a new login", "refresh_token": "third"}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    made = Provider()
    monkeypatch.setattr(sign_in, "IdentityProvider", made)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / login_file.NAME
    login_file.save(path, OLD)
    return path


def log_in(file: Path) -> None:
    sign_in.sign_in(OFFERED, OLD.servers, "", file, show=lambda *_: None)


@pytest.fixture
def during_a_refresh(
    provider: Provider, file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Path], Any]], None]:
    waits = threading.Event()
    locked = login_file.locked

    def noted(path: Path) -> Any:
        waits.set()
        return locked(path)

    monkeypatch.setattr(login_file, "locked", noted)
    return lambda what: _during_a_refresh(provider, file, waits, what)


def _during_a_refresh(
    provider: Provider, file: Path, waits: threading.Event, what: Callable[[Path], Any]
) -> None:
    """Begin ``what``, and let the provider answer a refresh once ``what`` waits for its lock, or has ended."""
    with ThreadPoolExecutor(2) as both:
        refreshed = both.submit(sign_in.FreshToken(str(file)).get)
        provider.asked.wait()
        waits.clear()
        other = both.submit(what, file)
        other.add_done_callback(lambda _: waits.set())
        waits.wait()
        provider.answers.set()
        assert refreshed.result() == "refreshed"
        other.result()


def test_a_logout_during_a_refresh_stays(
    during_a_refresh: Callable[..., None], provider: Provider, file: Path
) -> None:
    during_a_refresh(sign_in.sign_out)
    assert login_file.load(file) is None
    assert provider.revoked == ["second"], "the one that counted last"


def test_a_login_during_a_refresh_stays(during_a_refresh: Callable[..., None], file: Path) -> None:
    during_a_refresh(log_in)
    kept = login_file.load(file)
    assert kept is not None and kept.access_token == "of a new login"


def test_whoever_waits_for_a_lock_gets_the_one_that_others_see(provider: Provider, file: Path) -> None:
    lock = file.with_suffix(".lock")
    sign_in.sign_out(file)
    before = lock.stat().st_ino
    log_in(file)
    sign_in.sign_out(file)
    assert lock.stat().st_ino == before and sign_in.sign_out(file) is None


@pytest.mark.parametrize("text", [None, json.dumps({**OLD.__dict__, "refresh_token": "another"})])
def test_without_locks_a_refresh_overwrites_neither(provider: Provider, file: Path, text: str | None) -> None:
    """As a program of before does it, or a system without locks."""
    with ThreadPoolExecutor(1) as one:
        refreshed = one.submit(sign_in.FreshToken(str(file)).get)
        provider.asked.wait()
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        provider.answers.set()
        assert refreshed.result() == "refreshed"
    kept = login_file.load(file)
    expected = None if text is None else replace(OLD, refresh_token="another")
    assert kept == expected


def test_a_stranger_who_opens_the_page_of_a_login_ends_nothing() -> None:
    with _Callback() as callback, ThreadPoolExecutor(1) as one:
        answer = one.submit(callback.wait, "right", 60.0)
        for state in ("%C3%A9", "wrong", "right"):
            with urllib.request.urlopen(f"{callback.url}?state={state}&code=x", timeout=60) as page:
                assert page.status == 200
        assert answer.result() == {"state": "right", "code": "x"}
