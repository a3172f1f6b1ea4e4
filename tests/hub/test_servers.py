"""Servers with slices of the pool: what is lent at a start, given back however the server ends, and to nobody else."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from jupyter_gpupool.client import event_stream, requests
from jupyter_gpupool.core.errors import (
    ImpossibleRequest,
    PermissionDenied,
    PoolError,
    Unauthenticated,
    UnknownLease,
)
from jupyter_gpupool.core.models import Request
from jupyter_gpupool.transport.frames import WireError
from jupyter_gpupool.transport.handshake import Refused
from jupyter_gpupool.transport.lifeline import Lifeline

from ..conftest import PATIENCE_S
from .running import TOKEN, Hub

Eventually = Callable[..., Any]
#: What was lent last time is taken hold of by the server itself, as Jupyter's does.
TAKES = 'c.Spawner.environment = {"LIGHT_TAKES": "1"}'


@pytest.fixture(scope="module")
def hub(new_hub: Callable[..., Hub]) -> Hub:
    made = new_hub(TAKES, light=True)
    # What may be chosen is a function, as where it depends on the user's groups.
    lowered = made.folder / "lowered"
    made.write(
        f"{TAKES}\nmade = Limits\nLimits = lambda **_: lambda s: made(max_gpus=1 if os.path.exists('{lowered}') else 2)"
    )
    made.start()
    return made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, eventually: Eventually) -> Iterator[None]:
    yield
    if "hub" in request.fixturenames:
        hub: Hub = request.getfixturevalue("hub")
        for user in ("alice", "bob", "carol"):
            eventually(functools.partial(is_gone, hub, user), f"{user}'s server is stopped")
        eventually(lambda: not hub.leases(), "every lease has ended")


def is_gone(hub: Hub, user: str) -> bool:
    """Whether there is no server; one that is there is stopped, unless it ends at this moment by itself."""
    if hub.server(user) is None:
        return True
    hub.http.delete(f"/users/{user}/server")
    return False


def queued(hub: Hub, eventually: Eventually, user: str) -> None:
    """The hub answers after a second, whatever has become of the start by then."""
    eventually(lambda: hub.leases().get(user) == "QUEUED", f"{user} waits in the queue")


def start(hub: Hub, eventually: Eventually, user: str, **choice: Any) -> None:
    assert hub.spawn(user, **choice).status_code in (201, 202)
    eventually(lambda: hub.ready(user), f"{user}'s server runs")


def progress(hub: Hub, user: str, once_waiting: Callable[[], Any]) -> list[str]:
    """What the progress page is told, to the end."""
    said: list[str] = []
    with hub.http.stream("GET", f"/users/{user}/server/progress") as events:
        for line in events.iter_lines():
            if not line.startswith("data:"):
                continue
            said.append(json.loads(line[5:])["message"])
            if "position 1 in the queue" in said[-1]:
                once_waiting()
            if "ready" in said[-1] or "failed" in said[-1]:
                break
    return said


def held_by_itself(hub: Hub, eventually: Eventually, user: str) -> None:
    """The service has let go: the server's secret is not to be had any more."""
    mine = hub.pool(hub.token_of(user))
    eventually(lambda: mine.my_server()[1] == "", f"{user}'s server holds its lease")


def test_a_server_has_what_was_chosen_until_it_is_stopped(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=2, partial=0.5)
    (lease,) = hub.pool().leases()
    assert (lease.request.owner, lease.state.value) == ("alice", "ACTIVE")
    assert lease.request.namespace == "vision", "her group at the hub"
    assert [piece.memory_mib for piece in lease.slices] == [16255, 16255]
    held_by_itself(hub, eventually, "alice")
    hub.stop_server("alice")
    eventually(lambda: not hub.leases(), "it was given back")


def test_a_server_that_is_killed_gives_back_at_once(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=2, partial=1.0)
    held_by_itself(hub, eventually, "alice")
    hub.process_of("alice").kill()
    eventually(lambda: not hub.leases(), "it was given back")
    eventually(lambda: hub.server("alice") is None, "the hub has noticed")


def test_who_waits_is_told_and_has_its_turn(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=2, partial=0.8)
    hub.http.post("/users/bob")
    with httpx.Client(base_url=hub.http.base_url, headers=hub.http.headers, timeout=300) as other:
        options = {"gpupool": {"num_gpus": 1, "partial": 0.8}}
        assert other.post("/users/bob/server", json=options).status_code == 202
    queued(hub, eventually, "bob")
    assert hub.leases() == {"alice": "ACTIVE", "bob": "QUEUED"}
    progress(hub, "bob", lambda: hub.stop_server("alice"))
    eventually(lambda: hub.leases() == {"bob": "ACTIVE"}, "bob has it")


def test_who_leaves_the_queue_gets_no_server(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=2, partial=0.8)
    hub.spawn("bob", num_gpus=1, partial=0.8)
    queued(hub, eventually, "bob")
    (waiting,) = [lease for lease in hub.pool().leases() if lease.request.owner == "bob"]
    said = progress(hub, "bob", lambda: hub.pool().release(waiting.id))
    assert "the request for 1 × 0.8 was withdrawn" in said[-1]
    assert len(said) == len(set(said)), "nothing is told twice"
    eventually(lambda: hub.server("bob") is None, "no server of bob's starts any more")
    assert hub.leases() == {"alice": "ACTIVE"}


def test_a_start_that_is_interrupted_leaves_the_queue(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=2, partial=0.8)
    hub.spawn("bob", num_gpus=1, partial=0.8)
    queued(hub, eventually, "bob")
    hub.stop_server("bob")
    eventually(lambda: hub.leases() == {"alice": "ACTIVE"}, "bob's request is gone")


def test_who_waited_for_what_is_allowed_no_more_gets_no_server(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=2, partial=0.8)
    hub.spawn("bob", num_gpus=2, partial=0.8)
    queued(hub, eventually, "bob")
    lowered = hub.folder / "lowered"
    lowered.touch()
    try:
        said = progress(hub, "bob", lambda: hub.stop_server("alice"))
        assert "2 GPUs were chosen; this hub lends at most 1" in said[-1]
        eventually(lambda: not hub.leases(), "nothing is lent")
        eventually(lambda: hub.server("bob") is None, "no server of bob's starts any more")
    finally:
        lowered.unlink()


BAD: list[tuple[Any, str]] = [
    ({"num_gpus": 3, "partial": 0.5}, "this hub lends at most 2"),
    ({"num_gpus": -1}, "from 0 up"),
    ({"num_gpus": True}, "from 0 up"),
    ({"num_gpus": "1"}, "from 0 up"),
    ({"num_gpus": 1, "partial": 1.5}, "above 0 and at most 1"),
    ({"num_gpus": 1, "partial": 0.01}, "choose a share from 0.05 to 1"),
    ({"num_gpus": 1, "partial": float("1e-300")}, "choose a share from"),
    ({"num_gpus": 1, "owner": "bob"}, "unknown field"),
    ({"num_gpus": 1, "model": "A100"}, "1 GPU with name=A100 asked for"),
    (["num_gpus"], "must look like"),
    ("1", "must look like"),
]


@pytest.mark.parametrize(("choice", "why"), BAD, ids=lambda value: str(value)[:40])
def test_bad_options_start_nothing(hub: Hub, eventually: Eventually, choice: Any, why: str) -> None:
    hub.http.post("/users/alice")
    answer = hub.http.post("/users/alice/server", json={"gpupool": choice})
    if (
        answer.status_code == 202
    ):  # a second has passed: the page that shows the start's progress has the reason
        said = progress(hub, "alice", lambda: None)[-1]
    else:
        assert 400 <= answer.status_code < 500, answer.text
        said = answer.json()["message"]
    assert why in said
    eventually(lambda: hub.server("alice") is None, "no server of alice's starts")
    assert hub.leases() == {}


def test_one_user_cannot_reach_what_is_anothers(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=1, partial=0.5)
    start(hub, eventually, "bob", num_gpus=1, partial=0.5)
    pool = hub.pool()
    hers = next(lease for lease in pool.leases() if lease.request.owner == "alice")
    held_by_itself(hub, eventually, "alice")
    bobs = hub.pool(hub.token_of("bob"))

    # By the API, with her lease's id and any name that he likes.
    assert [lease.request.owner for lease in bobs.leases(include_ended=True)] == ["bob"] * len(
        bobs.leases(include_ended=True)
    )
    for attempt in (bobs.lease, bobs.release, bobs.heartbeat, lambda id: bobs.resize(id, partial=0.1)):
        with pytest.raises(UnknownLease):
            attempt(hers.id)
    said = str(bobs.pool())
    assert hers.id not in said
    assert "alice" not in said
    base, his = f"{hub.service_url}/gpupool/api/v1", {"Authorization": f"token {hub.token_of('bob')}"}
    for call in ("offer", "server?user=alice"):
        assert httpx.get(f"{base}/hub/{call}", headers=his, timeout=PATIENCE_S).status_code == 403
    assert httpx.delete(f"{base}/hub/server?user=alice", headers=his, timeout=PATIENCE_S).status_code == 403
    body = {"groups": [], "lease": str(uuid.uuid4()), "mode": "kernel", "choice": {"num_gpus": 2}}
    put = httpx.put(f"{base}/hub/server?user=bob", headers=his, json=body, timeout=PATIENCE_S)
    assert put.status_code == 403
    got = httpx.get(f"{base}/hub/mine?user=alice", headers=his, timeout=PATIENCE_S)
    assert got.json()["lease"]["request"]["owner"] == "bob"

    # By the environment: nothing of hers is in his, and her server's is not for others to read.
    assert not any(hers.id in value for value in hub.process_of("bob").environ().values())

    # By the data port: he knows where her worker listens, but not the secret.
    assert hers.worker is not None
    mine = next(lease for lease in bobs.leases())
    for secret in ("", "x" * 43, hub.token_of("bob")):
        spec = requests.attach_spec(bobs, replace(mine, worker=hers.worker), secret, "remote")
        with pytest.raises((Refused, WireError, OSError)):
            Lifeline(replace(spec, lease_id=hers.id))
    with socket.create_connection((hers.worker.host, hers.worker.port)) as raw:
        raw.sendall(b"\0" * 64)

    # By tokens that are nobody's, or a name.
    for token in ("", "alice", TOKEN[:-1] + "x"):
        with pytest.raises((Unauthenticated, PoolError)):
            hub.pool(token or "none").leases()
    assert hub.leases() == {"alice": "ACTIVE", "bob": "ACTIVE"}, "and hers goes on"


def test_a_token_is_worth_nothing_when_its_server_is_gone(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=1, partial=0.5)
    kept = hub.pool(hub.token_of("alice"))
    hub.stop_server("alice")
    eventually(lambda: hub.server("alice") is None, "it is gone")
    with pytest.raises((PermissionDenied, Unauthenticated)):
        kept.request(request())

    def refused() -> bool:
        try:
            kept.pool()
        except Unauthenticated:
            return True
        return False

    eventually(refused, "the hub does not know it any more")


def test_an_event_stream_ends_with_its_token(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=1, partial=0.5)
    hers = hub.pool(hub.token_of("alice"))

    async def until_its_end() -> tuple[int | None, str | None]:
        stream = await event_stream.connect(hers, {})
        assert json.loads(await stream.read_message() or "null")["type"] == "state"
        await asyncio.to_thread(hub.stop_server, "alice")
        while await stream.read_message() is not None:
            pass  # the pool's changes, until the hub is asked again
        return stream.close_code, stream.close_reason

    ended = asyncio.run(asyncio.wait_for(until_its_end(), PATIENCE_S))
    assert ended == (1008, "the token is not valid any more")


def test_who_leaves_a_group_leaves_its_namespace(hub: Hub, eventually: Eventually) -> None:
    def members(name: str) -> set[str]:
        return {user for one in hub.pool().namespaces() if one["name"] == name for user in one["members"]}

    start(hub, eventually, "carol", num_gpus=1, partial=0.5)
    assert "carol" in members("speech")
    mine = hub.pool(hub.token_of("carol"))
    (lease,) = mine.leases()
    try:
        hub.http.request("DELETE", "/groups/speech/users", json={"users": ["carol"]}).raise_for_status()
        hub.http.post("/groups/vision/users", json={"users": ["carol"]}).raise_for_status()
        eventually(lambda: mine.pool() and "carol" not in members("speech"), "the pool has heard of it")
        assert mine.lease(lease.id).state.value == "ACTIVE", "what she has stays"
        hub.stop_server("carol")
        eventually(lambda: hub.server("carol") is None, "her server is gone")
        start(hub, eventually, "carol", num_gpus=1, partial=0.5)
        assert "carol" in members("vision") and "carol" not in members("speech")
    finally:
        hub.http.request("DELETE", "/groups/vision/users", json={"users": ["carol"]})
        hub.http.post("/groups/speech/users", json={"users": ["carol"]})


def test_a_server_takes_no_more_than_was_chosen(hub: Hub, eventually: Eventually) -> None:
    start(hub, eventually, "alice", num_gpus=1, partial=0.5)
    hers = hub.pool(hub.token_of("alice"))
    with pytest.raises(PermissionDenied, match="share the GPU slices that were chosen for it"):
        hers.request(request())
    (lease,) = hers.leases()
    with pytest.raises(ImpossibleRequest, match="1 × 0.5 was chosen"):
        hers.resize(lease.id, partial=0.9)
    assert hers.resize(lease.id, partial=0.3).slices[0].memory_mib == 9753


def request(**fields: Any) -> Request:
    return requests.new_request(**{"partial": 0.2, **fields})[0]
