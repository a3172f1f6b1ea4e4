"""The pool inside a Jupyter server: who may call it, who finds it, and what is left when it ends."""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import json
import os
import signal
import stat
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from jupyter_server.auth import Authorizer, IdentityProvider, User
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import PoolError

from ..conftest import PATIENCE_S
from ..support.processes import runs

API = ("gpupool", "api", "v1")


@pytest.fixture
def jp_server_config() -> dict[str, Any]:
    return {
        "ServerApp": {"jpserver_extensions": {"jupyter_gpupool": True}},
        # Nobody attaches here, and a busy machine takes its time.
        "LocalEngine": {"emulate": "always", "attach_timeout_s": 120.0},
    }


#: Long enough for a worker to be up.
WAIT = {"wait": "30"}


async def hear(socket: Any) -> dict[str, Any]:
    """The next message of a feed."""
    message = await asyncio.wait_for(socket.read_message(), PATIENCE_S)
    assert message is not None, "the pool closed the connection"
    return json.loads(message)


def body(**fields: Any) -> str:
    secret = hashlib.sha256(os.urandom(16)).hexdigest()
    return json.dumps({"id": str(uuid.uuid4()), "partial": 0.5, "secret_sha256": secret, **fields})


class TestUnderJupytersRules:
    async def test_the_pool_is_below_the_base_url(self, jp_fetch: Callable[..., Any]) -> None:
        answer = json.loads((await jp_fetch(*API, "pool")).body)
        (server,) = answer["servers"]
        assert [gpu["name"] for gpu in server["gpus"]] == ["Tesla V100-PCIE-32GB (emulated)"] * 2
        assert all(gpu["emulated"] for gpu in server["gpus"])

    async def test_nobody_without_the_servers_token(self, jp_fetch: Callable[..., Any]) -> None:
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch(*API, "pool", headers={"Authorization": "token wrong"})
        assert refused.value.code == 403

    async def test_a_grant_belongs_to_whoever_runs_the_server(self, jp_fetch: Callable[..., Any]) -> None:
        made = await jp_fetch(*API, "leases", method="POST", body=body())
        lease = json.loads(made.body)
        assert lease["request"]["owner"] == getpass.getuser()
        pool = json.loads((await jp_fetch(*API, "pool")).body)
        owners = {s["owner"] for gpu in pool["servers"][0]["gpus"] for s in gpu["slices"]}
        assert owners == {getpass.getuser()}
        ended = await jp_fetch(*API, "leases", lease["id"], method="DELETE")
        assert json.loads(ended.body)["state"] == "RELEASED"

    async def test_a_refusal_is_one_line(self, jp_fetch: Callable[..., Any]) -> None:
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch(*API, "leases", method="POST", body=body(partial=1.5))
        assert refused.value.code == 400
        said = json.loads(refused.value.response.body)
        assert said["error"] == "InvalidRequest"
        assert "1.5" in said["message"]
        assert "\n" not in said["message"]

    async def test_a_lease_is_resized(self, jp_fetch: Callable[..., Any]) -> None:
        asked = body()
        made: dict[str, Any] = {"state": "QUEUED"}
        while made["state"] in ("QUEUED", "GRANTED"):  # asking again is harmless
            answer = await jp_fetch(*API, "leases", method="POST", body=asked, params=WAIT)
            made = json.loads(answer.body)
        assert made["state"] == "ACTIVE"
        path = (*API, "leases", made["id"])
        resized = await jp_fetch(*path, method="PATCH", body=json.dumps({"partial": 0.25}))
        assert [s["memory_mib"] for s in json.loads(resized.body)["slices"]] == [8127]
        await jp_fetch(*path, method="DELETE")

    async def test_changes_are_told_as_they_happen(
        self, jp_fetch: Callable[..., Any], jp_ws_fetch: Callable[..., Any]
    ) -> None:
        socket = await jp_ws_fetch(*API, "events")
        state = await hear(socket)
        assert state["type"] == "state"
        assert len(state["gpus"]) == 2
        assert not state["leases"]
        made = json.loads((await jp_fetch(*API, "leases", method="POST", body=body())).body)
        while made["id"] not in (delta := await hear(socket)).get("leases", {}):
            assert delta["type"] == "delta"
        socket.close()
        again = await jp_ws_fetch(*API, "events", params={"feed": state["feed"], "seq": state["seq"]})
        assert (await hear(again))["type"] == "resumed"
        again.close()
        await jp_fetch(*API, "leases", made["id"], method="DELETE")

    async def test_nobody_watches_without_the_servers_token(self, jp_ws_fetch: Callable[..., Any]) -> None:
        with pytest.raises(HTTPClientError) as refused:
            await jp_ws_fetch(*API, "events", headers={"Authorization": "token wrong"})
        assert refused.value.code == 403


class ReadOnly(Authorizer):
    def is_authorized(self, handler: Any, user: User, action: str, resource: str) -> bool:
        return resource != "gpupool" or action == "read"


class Named(IdentityProvider):
    def get_user(self, handler: Any) -> User | None:
        name = handler.request.headers.get("X-Name")
        return User(username=name) if name else None


class TestWithOtherRules:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        jp_server_config["ServerApp"].update(
            authorizer_class=ReadOnly, identity_provider_class=Named, disable_check_xsrf=True
        )
        return jp_server_config

    async def test_the_authorizer_decides(self, jp_fetch: Callable[..., Any]) -> None:
        ada = {"X-Name": "ada"}
        assert (await jp_fetch(*API, "pool", headers=ada)).code == 200
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch(*API, "leases", method="POST", body=body(), headers=ada)
        assert refused.value.code == 403
        assert not json.loads((await jp_fetch(*API, "leases", headers=ada)).body)["leases"]

    async def test_and_over_who_may_watch(self, jp_ws_fetch: Callable[..., Any]) -> None:
        with pytest.raises(HTTPClientError) as refused:
            await jp_ws_fetch(*API, "events", headers={"X-Name": "ada"})  # a socket is execute, not read
        assert refused.value.code == 403


class TestWithNamedUsers:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        jp_server_config["ServerApp"].update(identity_provider_class=Named, disable_check_xsrf=True)
        return jp_server_config

    async def test_each_sees_and_releases_their_own(self, jp_fetch: Callable[..., Any]) -> None:
        ada, bob = {"X-Name": "ada"}, {"X-Name": "bob"}
        made = json.loads((await jp_fetch(*API, "leases", method="POST", body=body(), headers=ada)).body)
        assert made["request"]["owner"] == "ada"
        assert not json.loads((await jp_fetch(*API, "leases", headers=bob)).body)["leases"]
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch(*API, "leases", made["id"], method="DELETE", headers=bob)
        assert refused.value.code == 404
        await jp_fetch(*API, "leases", made["id"], method="DELETE", headers=ada)

    async def test_no_page_of_another_site_watches(self, jp_ws_fetch: Callable[..., Any]) -> None:
        from_here = await jp_ws_fetch(*API, "events", headers={"X-Name": "ada"})
        assert (await hear(from_here))["type"] == "state"
        from_here.close()
        with pytest.raises(HTTPClientError) as refused:
            await jp_ws_fetch(*API, "events", headers={"X-Name": "ada", "Origin": "http://elsewhere.example"})
        assert refused.value.code == 403


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def none_lives(processes: list[psutil.Process]) -> Callable[[], bool]:
    return lambda: not any(map(runs, processes))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_outlives_the_server(
    start_server: Callable[[], Any], eventually: Callable[..., Any], sign: signal.Signals
) -> None:
    process, http = start_server()
    lease = http.post("/leases", params={"wait": 30}, content=body()).json()
    assert lease["slices"]
    children = eventually(lambda: family(process), "the pool has a process that starts workers")
    process.send_signal(sign)
    process.wait(300)
    eventually(none_lives(children), "the processes of the pool have ended")
    assert discovery.find() is None


def test_the_users_other_processes_find_it(start_server: Callable[[], Any]) -> None:
    process, http = start_server()
    address = discovery.find()
    assert address is not None
    assert address.pid == process.pid
    published = discovery.folder() / f"pool-{process.pid}.json"
    assert stat.S_IMODE(published.stat().st_mode) == 0o600
    with PoolClient(address.url, address.token) as client:
        assert len(client.pool()["servers"][0]["gpus"]) == 2
    with PoolClient(address.url, "wrong") as stranger, pytest.raises(PoolError):
        stranger.pool()
    # Jupyter's own token opens Jupyter's door only, and this one the pool's.
    headers = {"Authorization": f"token {address.token}"}
    assert httpx.get(f"{http.base_url}pool", headers=headers, timeout=PATIENCE_S).status_code == 403


def test_a_second_server_joins_the_first_and_takes_its_place(
    start_server: Callable[[], Any], eventually: Callable[..., Any]
) -> None:
    first, at_first = start_server()
    second, at_second = start_server()
    address = discovery.find()
    assert address is not None
    assert address.pid == first.pid
    made = at_first.post("/leases", content=body()).json()
    assert [lease["id"] for lease in at_second.get("/leases").json()["leases"]] == [made["id"]]
    assert at_second.delete(f"/leases/{made['id']}").json()["state"] == "RELEASED"
    assert at_second.delete(f"/leases/{uuid.uuid4()}").status_code == 404
    url = str(at_second.base_url).replace("http", "ws", 1) + "events"

    async def watch() -> None:
        watching = HTTPRequest(
            url,
            headers={"Authorization": at_second.headers["Authorization"]},
            connect_timeout=PATIENCE_S,
            request_timeout=PATIENCE_S,
        )
        socket = await websocket_connect(watching)
        there = await hear(socket)
        first.kill()
        while await asyncio.wait_for(socket.read_message(), PATIENCE_S) is not None:
            pass  # until it is told that the pool has gone
        here = await hear(await websocket_connect(watching))
        assert (there["type"], here["type"]) == ("state", "state")
        assert here["feed"] != there["feed"]

    asyncio.run(watch())
    first.wait(300)
    eventually(lambda: at_second.get("/pool").status_code == 200, "the second server hosts the pool")
    address = discovery.find()
    assert address is not None
    assert address.pid == second.pid


class TestWithABrokenLedger:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
        ledger = tmp_path / "ledger.sqlite"
        ledger.write_text("this is no database at all, though it is long enough to be read as one\n" * 100)
        jp_server_config["PoolService"] = {"db_url": f"sqlite:///{ledger}"}
        return jp_server_config

    async def test_the_rest_of_the_server_works_and_the_panel_gets_the_reason(
        self, jp_fetch: Callable[..., Any]
    ) -> None:
        assert (await jp_fetch("api", "contents")).code == 200
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch(*API, "pool")
        assert refused.value.code == 503
        said = json.loads(refused.value.response.body)
        assert said["error"] == "LedgerUnavailable"
        assert "\n" not in said["message"]
