"""What those who watch a pool are told: the state, then what changes, and what they missed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from jupyter_gpupool.client import discovery
from jupyter_gpupool.server.watch.visibility import difference

from ..conftest import PATIENCE_S
from .conftest import Pool, ask


async def watch(query: str = "", token: str | None = None) -> WebSocketClientConnection:
    address = discovery.find()
    assert address is not None
    url = address.url.replace("http", "ws", 1) + f"/gpupool/api/v1/events{query}"
    return await websocket_connect(
        HTTPRequest(
            url,
            headers={"Authorization": f"Bearer {token or address.token}"},
            connect_timeout=PATIENCE_S,
            request_timeout=PATIENCE_S,
        )
    )


async def hear(socket: WebSocketClientConnection) -> dict[str, Any]:
    message = await asyncio.wait_for(socket.read_message(), PATIENCE_S)
    assert message is not None, "the pool closed the connection"
    return json.loads(message)


async def until(
    socket: WebSocketClientConnection, wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    while True:
        message = await hear(socket)
        if wanted(message):
            return message


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 3 * PATIENCE_S))  # type: ignore[arg-type]


def test_the_state_then_a_lease_from_grant_to_end(pool: Pool) -> None:
    async def scene() -> None:
        socket = await watch()
        state = await hear(socket)
        assert state["type"] == "state" and state["leases"] == {} and state["queue"] == []
        assert [gpu["granted_mib"] for gpu in state["gpus"].values()] == [0, 0]
        lease, line = await asyncio.to_thread(pool.hold, ask(0.8, 2))
        active = await until(socket, lambda m: m.get("leases", {}).get(lease.id, {}).get("state") == "ACTIVE")
        assert active["type"] == "delta" and "servers" not in active
        await asyncio.to_thread(line.release)
        over = await until(socket, lambda m: m.get("leases", {}).get(lease.id, {}).get("ended_at"))
        assert over["leases"][lease.id]["state"] == "RELEASED"
        assert {gpu["granted_mib"] for gpu in over["gpus"].values()} == {0}
        assert "secret" not in json.dumps([state, active, over])
        socket.close()

    play(scene)


def test_who_comes_back_is_told_what_was_missed(pool: Pool) -> None:
    async def scene() -> None:
        socket = await watch()
        state = await hear(socket)
        last = (await hear(socket))["seq"]
        socket.close()
        other = await watch()  # somebody goes on watching
        lease = await asyncio.to_thread(pool.client.request, ask(0.5), 60)
        await until(other, lambda m: lease.id in m.get("leases", {}))
        again = await watch(f"?feed={state['feed']}&seq={last}")
        assert (await hear(again))["type"] == "resumed"
        heard = [await hear(again)]
        while lease.id not in heard[-1].get("leases", {}):
            heard.append(await hear(again))
        assert [m["seq"] for m in heard] == list(range(last + 1, last + 1 + len(heard)))
        for question in (f"?feed={state['feed']}&seq=999999", "?feed=another&seq=1", "?seq=nonsense"):
            stranger = await watch(question)
            assert (await hear(stranger))["type"] == "state"
            stranger.close()
        other.close()
        again.close()
        await asyncio.to_thread(pool.client.release, lease.id)

    play(scene)


def test_a_quiet_pool_says_little(pool: Pool) -> None:
    async def scene() -> None:
        socket = await watch()
        await hear(socket)
        sizes = [len(json.dumps(await hear(socket))) for _ in range(3)]
        assert max(sizes) < 200
        socket.close()

    play(scene)


def test_without_the_token_there_is_nothing_to_see(pool: Pool) -> None:
    async def scene() -> None:
        with pytest.raises(HTTPClientError) as refused:
            await watch(token="wrong")
        assert refused.value.code == 401

    play(scene)


def test_a_delta_says_what_differs_and_no_more() -> None:
    old: dict[str, Any] = {
        "servers": [1],
        "queue": [],
        "healthy": True,
        "gpus": {"a": {"busy": 0, "name": "x"}, "b": {"busy": 0}},
        "leases": {"1": {"state": "QUEUED", "id": "1"}},
    }
    new: dict[str, Any] = {
        "servers": [1],
        "queue": ["2"],
        "healthy": True,
        "gpus": {"a": {"busy": 1, "name": "x"}, "c": {"busy": 0}},
        "leases": {"2": {"state": "QUEUED", "id": "2"}},
    }
    assert difference(old, old) == {}
    assert difference(old, new) == {
        "queue": ["2"],
        "gpus": {"a": {"busy": 1}, "b": None, "c": {"busy": 0}},
        "leases": {"1": None, "2": {"state": "QUEUED", "id": "2"}},
    }
