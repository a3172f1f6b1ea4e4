"""A server for many, with one who keeps too much open, or queues too much."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from tornado.httpclient import HTTPError

from jupyter_gpupool.client import event_stream, requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.api import PREFIX
from jupyter_gpupool.core.errors import TooManyRequests
from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.core.request_schema import body_of

from ...conftest import PATIENCE_S
from .conftest import Server


@pytest.fixture
def limited(new_server: Callable[..., Server]) -> Iterator[Server]:
    server = new_server(options=("--OpenCallLimits.per_user=3", "--PoolService.queued_per_user=2"))
    server.start()
    yield server


def test_who_opens_too_many_event_streams_is_told_to_wait_and_others_are_not(
    limited: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, bob = (limited.client(limited.token(owner=name)["token"]) for name in ("ada", "bob"))

    async def main() -> None:
        streams = [await event_stream.connect(ada, {}) for _ in range(3)]
        with pytest.raises(HTTPError) as refused:
            await event_stream._connect(ada, {})
        assert refused.value.code == 429
        assert refused.value.response is not None
        assert refused.value.response.headers["Retry-After"] == "5"
        with monkeypatch.context() as impatient:
            impatient.setattr(event_stream, "MAX_RATE_WAIT_S", 0.0)
            with pytest.raises(TooManyRequests, match="this user's tokens together have 3 event streams"):
                await event_stream.connect(ada, {})
        stream = await event_stream.connect(bob, {})
        assert "state" in str(await stream.read_message())
        stream.close()
        with caplog.at_level(logging.WARNING, "jupyter_gpupool.client.event_stream"):
            comes_back = asyncio.ensure_future(event_stream.connect(ada, {}))
            while "waiting" not in caplog.text:
                await asyncio.sleep(0.01)
            streams.pop().close()
            streams.append(await comes_back)  # when one of the others has ended
        for one in streams:
            one.close()

    asyncio.run(main())


def test_calls_that_wait_count_and_calls_that_do_not_go_on(
    limited: Server, eventually: Callable[..., object]
) -> None:
    token = limited.token(owner="eve")["token"]
    eve = limited.client(token)
    request, _ = requests.new_request(partial=0.1)
    lease = requests.acquire(eve, request)

    def wait() -> httpx.Response:
        context = PoolClient(limited.url, ca=limited.ca).context
        with httpx.Client(verify=context, trust_env=False, timeout=PATIENCE_S) as http:
            query = {"wait": 30, "state": eve.lease(lease.id).state.value}
            head = {"Authorization": f"Bearer {token}"}
            return http.get(f"{limited.url}{PREFIX}/leases/{lease.id}", params=query, headers=head)

    answers: list[httpx.Response] = []
    waiting = [threading.Thread(target=lambda: answers.append(wait())) for _ in range(4)]
    for thread in waiting:
        thread.start()
    eventually(lambda: answers, "one is refused")
    assert answers[0].status_code == 429
    assert answers[0].headers["Retry-After"] == "5"
    assert answers[0].json()["error"] == "TooManyRequests"
    assert eve.heartbeat(lease.id).state in (LeaseState.GRANTED, LeaseState.ACTIVE)
    eve.release(lease.id)
    for thread in waiting:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429]


def test_who_queues_too_much_is_refused_and_others_queue_on(limited: Server) -> None:
    clients = [limited.client(limited.token(owner=name)["token"]) for name in ("kay", "lee")]
    held = [clients[0].request(requests.new_request(partial=1.0)[0]) for _ in range(2)]
    queued = [requests.new_request(partial=1.0)[0] for _ in range(2)]
    for request in queued:
        assert clients[0].request(request).state is LeaseState.QUEUED
    more, _ = requests.new_request(partial=1.0)
    refused = clients[0]._send("POST", "/leases", {"wait": 0}, body_of(more), 0.0, rate_wait_s=0.0)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
    assert "this user has 2 requests in the queue, and may have 2" in refused.json()["message"]
    assert clients[0].request(queued[0]).state is LeaseState.QUEUED, "a repeated request is not a new one"
    theirs, _ = requests.new_request(partial=1.0)
    assert clients[1].request(theirs).state is LeaseState.QUEUED
    clients[0].release(queued[0].id)
    assert clients[0].request(more).state is LeaseState.QUEUED
    clients[1].release(theirs.id)
    for lease_id in (more.id, queued[1].id, *(lease.id for lease in held)):
        clients[0].release(lease_id)
