"""A server for many, with one who asks too often."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from jupyter_gpupool.client import requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.api import PREFIX
from jupyter_gpupool.core.errors import TooManyRequests
from jupyter_gpupool.core.models import LeaseState

from ...conftest import PATIENCE_S
from .conftest import Server


@pytest.fixture
def limited(new_server: Callable[..., Server]) -> Iterator[Server]:
    server = new_server(options=('--RateLimits.per_user={"reads": 0.6, "changes": 1, "renewals": 100}',))
    server.start()
    yield server


def flood(server: Server, token: str) -> httpx.Response:
    """The first refusal of many calls."""
    context = PoolClient(server.url, ca=server.ca).context
    with httpx.Client(verify=context, trust_env=False, timeout=PATIENCE_S) as http:
        for _ in range(100):
            answer = http.get(f"{server.url}{PREFIX}/whoami", headers={"Authorization": f"Bearer {token}"})
            if answer.status_code != 200:
                return answer
            assert answer.headers["RateLimit-Policy"] == '"user-reads";q=3;w=5'
    raise AssertionError("it was never refused")


def test_who_asks_too_often_is_told_when_to_come_back_and_loses_nothing(
    limited: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, bob = (limited.client(limited.token(owner=name)["token"]) for name in ("ada", "bob"))
    request, _ = requests.new_request(partial=0.1)
    lease = requests.acquire(ada, request)
    token = limited.token(owner="ada")["token"]
    refused = flood(limited, token)
    assert refused.status_code == 429 and refused.json() == {
        "error": "TooManyRequests",
        "message": "this user's tokens together may make 0.6 calls that read per second; make fewer, or ask the "
        "pool's administrator for a higher limit",
    }
    assert refused.headers["Retry-After"] in ("1", "2")
    for _ in range(20):  # reads do not cost her lease
        assert ada.heartbeat(lease.id).state in (LeaseState.GRANTED, LeaseState.ACTIVE)
    assert bob.whoami()["owner"] == "bob"
    assert limited.administrator().whoami()["administers"]

    waits: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: (waits.append(s), sleep(s)))
    with caplog.at_level(logging.WARNING, "jupyter_gpupool.client.pool_connection"):
        while not waits:  # the longer this takes, the more she may ask again
            flood(limited, token)
            assert ada.whoami()["owner"] == "ada"  # the client comes back by itself, and says that it waits
    assert waits and all(wait >= 1 for wait in waits)
    assert "calls that read per second" in caplog.text and "waiting" in caplog.text
    ada.release(lease.id)


def test_a_client_that_would_wait_for_long_is_refused_at_once(
    limited: Server, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    ada = limited.client(limited.token(owner="ada")["token"])
    monkeypatch.setattr("jupyter_gpupool.client.pool_connection.MAX_RATE_WAIT_S", 0.0)
    seen: list[Any] = []
    with pytest.raises(TooManyRequests, match="may make 0.6 calls that read per second"):
        for _ in range(50):
            seen.append(ada._send("GET", "/whoami", None, None, 0.0, rate_wait_s=0.0))
            if seen[-1].status_code == 429:
                raise ada._refusal(seen[-1], seen[-1].json())
    eventually(
        lambda: ada.pass_on("GET", "/whoami", {}, b"", "application/json").status == 429,
        "a call that is passed on does not wait either",
    )
