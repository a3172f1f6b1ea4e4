"""What the extension adds to a Jupyter server: wishes for kernels, gauges, events, a pool elsewhere, and who may."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import Authorizer, IdentityProvider, User
from tornado.httpclient import HTTPClientError

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.jupyter.lease_events import SCHEMA_ID

from ..conftest import PATIENCE_S

pytest.importorskip("torch", reason="workers need PyTorch")

API = ("gpupool", "api", "v1")


@pytest.fixture
def jp_server_config() -> dict[str, Any]:
    return {
        "ServerApp": {"jpserver_extensions": {"jupyter_gpupool": True}},
        "LocalEngine": {"emulate": "always", "emulated_count": 1, "attach_timeout_s": 120.0},
    }


@pytest.fixture(autouse=True)
def started(jp_serverapp: Any, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """pytest-jupyter loads extensions, but leaves out the last step of a server's start."""
    jp_asyncio_loop.run_until_complete(jp_serverapp.extension_manager.start_all_extensions())
    yield
    # A kernel whose start failed stays among those that are about to start, which no shutdown of all bears.
    jp_serverapp.kernel_manager._pending_kernels.clear()


async def hear(socket: Any) -> dict[str, Any]:
    """The next message of a feed."""
    message = await asyncio.wait_for(socket.read_message(), PATIENCE_S)
    assert message is not None, socket.close_reason
    return json.loads(message)


async def until(condition: Callable[[], Any], what: str) -> Any:
    """As the fixture ``eventually``, in a test whose own loop hosts the pool."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE_S:g} s: {what}")
        await asyncio.sleep(0.02)
    return value


async def leased(jp_fetch: Callable[..., Any], wish: dict[str, Any]) -> None:
    """Return when the lease's worker runs."""
    state = "QUEUED"
    while state in ("QUEUED", "GRANTED"):  # asking again is harmless
        answer = await jp_fetch(*API, "leases", method="POST", body=json.dumps(wish), params={"wait": "30"})
        state = json.loads(answer.body)["state"]
    assert state == "ACTIVE"


async def put(jp_fetch: Callable[..., Any], kernel_id: str, wish: Any, **how: Any) -> dict[str, Any]:
    body = wish if isinstance(wish, str) else json.dumps(wish)
    return json.loads((await jp_fetch(*API, "kernels", kernel_id, method="PUT", body=body, **how)).body)


class TestAWishForAKernel:
    async def test_is_what_the_kernel_of_that_id_gets(
        self, jp_fetch: Callable[..., Any], kernelspec: Callable[..., str]
    ) -> None:
        name, kernel_id = kernelspec(), str(uuid.uuid4())
        await put(
            jp_fetch, kernel_id, {"num_gpus": 1, "memory_mib": 2048, "spread": True, "never_park": True}
        )
        stored = json.loads((await jp_fetch(*API, "kernels", kernel_id)).body)
        assert stored["memory_mib"] == 2048
        body = json.dumps(
            {"path": "x.ipynb", "type": "notebook", "name": "x.ipynb"}
            | {"kernel": {"name": name, "id": kernel_id}}
        )
        await jp_fetch("api", "sessions", method="POST", body=body)
        (lease,) = json.loads((await jp_fetch(*API, "leases")).body)["leases"]
        assert lease["state"] == "ACTIVE"
        assert lease["request"]["memory_mib"] == 2048
        assert lease["request"]["spread"], "which is no matter where there is one server"
        assert lease["request"]["never_park"]
        assert lease["request"]["label"] == "x.ipynb"
        with pytest.raises(HTTPClientError) as gone:
            await jp_fetch(*API, "kernels", kernel_id)
        assert gone.value.code == 404
        await jp_fetch("api", "kernels", kernel_id, "restart", method="POST", body="{}")
        (same,) = json.loads((await jp_fetch(*API, "leases")).body)["leases"]
        assert same["id"] == lease["id"]
        assert same["worker"]["pid"] == lease["worker"]["pid"]
        await jp_fetch("api", "kernels", kernel_id, method="DELETE")
        assert not json.loads((await jp_fetch(*API, "leases")).body)["leases"]

    @pytest.mark.parametrize(
        "wish",
        ["{", "[]", '"two"', {"num_gpus": "two"}, {"gpus": 1}, {"filters": {"name": 1}}, {"require": 1}],
        ids=str,
    )
    async def test_that_is_nonsense_is_refused_in_one_line(
        self, jp_fetch: Callable[..., Any], wish: Any
    ) -> None:
        kernel_id = str(uuid.uuid4())
        with pytest.raises(HTTPClientError) as refused:
            await put(jp_fetch, kernel_id, wish)
        said = json.loads(refused.value.response.body)
        assert (refused.value.code, said["error"]) == (400, "InvalidRequest")
        assert "\n" not in said["message"]
        with pytest.raises(HTTPClientError) as unknown:
            await jp_fetch(*API, "kernels", kernel_id)
        assert unknown.value.code == 404

    async def test_needs_a_kernels_id(self, jp_fetch: Callable[..., Any]) -> None:
        with pytest.raises(HTTPClientError) as refused:
            await put(jp_fetch, "my-kernel", {"num_gpus": 1})
        assert refused.value.code == 400

    @pytest.mark.parametrize(
        ("wish", "status"),
        [({"num_gpus": 2}, 422), ({"num_gpus": 1, "partial": 2}, 400)],
        ids=["impossible", "senseless"],
    )
    async def test_that_cannot_be_met_ever_fails_the_start_with_its_reason(
        self, jp_fetch: Callable[..., Any], kernelspec: Callable[..., str], wish: dict, status: int
    ) -> None:
        name, kernel_id = kernelspec(), str(uuid.uuid4())
        await put(jp_fetch, kernel_id, wish)
        with pytest.raises(HTTPClientError) as refused:
            body = json.dumps({"name": name, "kernel_id": kernel_id})
            await jp_fetch("api", "kernels", method="POST", body=body)
        said = json.loads(refused.value.response.body)
        assert refused.value.code == status
        assert said["message"].startswith("Kernel not started")
        assert "\n" not in said["message"]
        assert "traceback" not in said
        assert not json.loads((await jp_fetch(*API, "leases", params={"all": "1"})).body)["leases"]

    async def test_that_requires_what_is_taken_is_a_503_with_its_reason(
        self, jp_fetch: Callable[..., Any], kernelspec: Callable[..., str]
    ) -> None:
        name, first, second = kernelspec(), str(uuid.uuid4()), str(uuid.uuid4())
        for kernel_id in (first, second):
            await put(jp_fetch, kernel_id, {"num_gpus": 1, "require": True})
        body = {"name": name}
        await jp_fetch("api", "kernels", method="POST", body=json.dumps(body | {"kernel_id": first}))
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch("api", "kernels", method="POST", body=json.dumps(body | {"kernel_id": second}))
        assert refused.value.code == 503
        assert "cannot be granted now" in json.loads(refused.value.response.body)["message"]
        assert len(json.loads((await jp_fetch(*API, "leases")).body)["leases"]) == 1
        await jp_fetch("api", "kernels", first, method="DELETE")


class Reader(Authorizer):
    def is_authorized(self, handler: Any, user: User, action: str, resource: str) -> bool:
        return resource != "gpupool" or action == "read"


class Stranger(Authorizer):
    def is_authorized(self, handler: Any, user: User, action: str, resource: str) -> bool:
        return resource != "gpupool"


class Named(IdentityProvider):
    def get_user(self, handler: Any) -> User | None:
        name = handler.request.headers.get("X-Name")
        return User(username=name) if name else None


#: Every call of the API: method, path, and whether it changes anything.
CALLS = [
    ("GET", "pool", False),
    ("GET", "leases", False),
    ("GET", f"leases/{uuid.uuid4()}", False),
    ("GET", "health", False),
    ("GET", "openapi.json", False),
    ("GET", f"kernels/{uuid.uuid4()}", False),
    ("POST", "leases", True),
    ("POST", f"leases/{uuid.uuid4()}/heartbeat", True),
    ("DELETE", f"leases/{uuid.uuid4()}", True),
    ("PUT", f"kernels/{uuid.uuid4()}", True),
    ("DELETE", f"kernels/{uuid.uuid4()}", True),
]


async def status(jp_fetch: Callable[..., Any], method: str, path: str, headers: dict[str, str]) -> int:
    body = "{}" if method in ("POST", "PUT") else None
    try:
        answer = await jp_fetch(*API, *path.split("/"), method=method, body=body, headers=headers)
    except HTTPClientError as e:
        return e.code
    return answer.code


class TestEveryCallAsksWhoCalls:
    @pytest.fixture
    def authorizer(self) -> type[Authorizer]:
        return Stranger

    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any], authorizer: type) -> dict[str, Any]:
        jp_server_config["ServerApp"].update(
            authorizer_class=authorizer, identity_provider_class=Named, disable_check_xsrf=True
        )
        return jp_server_config

    async def test_signed_out(self, jp_fetch: Callable[..., Any]) -> None:
        for method, path, _ in CALLS:
            assert await status(jp_fetch, method, path, {}) == 403, (method, path)

    async def test_signed_in_and_refused(self, jp_fetch: Callable[..., Any]) -> None:
        for method, path, _ in CALLS:
            assert await status(jp_fetch, method, path, {"X-Name": "ada"}) == 403, (method, path)

    class TestWhoMayRead:
        @pytest.fixture
        def authorizer(self) -> type[Authorizer]:
            return Reader

        @pytest.fixture
        def jp_server_config(self, jp_server_config: dict[str, Any], authorizer: type) -> dict[str, Any]:
            jp_server_config["ServerApp"].update(
                authorizer_class=authorizer, identity_provider_class=Named, disable_check_xsrf=True
            )
            return jp_server_config

        async def test_changes_nothing(self, jp_fetch: Callable[..., Any]) -> None:
            for method, path, changes in CALLS:
                code = await status(jp_fetch, method, path, {"X-Name": "ada"})
                assert (code == 403) == changes, (method, path, code)


async def test_another_sites_page_changes_nothing(jp_fetch: Callable[..., Any]) -> None:
    """With a cookie alone, and without the cross-site token, nothing is written."""
    headers = {"Authorization": "", "Cookie": "_xsrf=stolen", "Origin": "http://elsewhere.example"}
    for method, path, changes in CALLS:
        if changes:
            # Jupyter Server says 404 where the origin is what it dislikes.
            assert await status(jp_fetch, method, path, headers) in (403, 404), (method, path)
    assert not json.loads((await jp_fetch(*API, "leases", params={"all": "1"})).body)["leases"]


async def test_jupyters_metrics_have_the_pools_gauges(jp_fetch: Callable[..., Any]) -> None:
    async def gauge(name: str) -> dict[str, float]:
        lines = (await jp_fetch("metrics")).body.decode().splitlines()
        found = [line.rsplit(" ", 1) for line in lines if line.startswith(name)]
        return {series.removeprefix(name): float(value) for series, value in found}

    secret = "0" * 64
    wish = {"id": str(uuid.uuid4()), "partial": 0.5, "secret_sha256": secret}
    await leased(jp_fetch, wish)
    deadline = time.monotonic() + PATIENCE_S
    while not sum((granted := await gauge("gpupool_gpu_granted_bytes")).values()):
        assert time.monotonic() < deadline, "what is granted is among the metrics"
        await asyncio.sleep(0.02)
    assert list(granted.values()) == [16255 * 1024 * 1024]
    assert all('emulated="true"' in series and 'gpu="0"' in series for series in granted)
    assert list((await gauge("gpupool_gpu_memory_bytes")).values()) == [32510 * 1024 * 1024]
    assert sum((await gauge("gpupool_leases")).values()) == 1
    assert await gauge("gpupool_up") == {"": 1.0}


async def test_every_change_of_a_lease_is_a_jupyter_event(
    jp_serverapp: Any, jp_fetch: Callable[..., Any]
) -> None:
    heard: list[dict[str, Any]] = []

    async def note(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        heard.append(data)

    jp_serverapp.event_logger.add_listener(schema_id=SCHEMA_ID, listener=note)
    lease = str(uuid.uuid4())
    wish = {"id": lease, "partial": 0.5, "secret_sha256": "0" * 64}
    await leased(jp_fetch, wish)
    await jp_fetch(*API, "leases", lease, method="DELETE")
    await until(lambda: len(heard) >= 3, "three changes are told")
    assert sorted((e["previous"] or "", e["state"]) for e in heard) == [
        ("", "GRANTED"),
        ("ACTIVE", "RELEASED"),
        ("GRANTED", "ACTIVE"),
    ]
    assert all(e["lease"] == lease and e["num_gpus"] == 1 for e in heard)


class TestAConfiguredPool:
    @pytest.fixture
    def elsewhere(self, pool: PoolClient) -> discovery.PoolAddress:
        address = discovery.find()
        assert address is not None
        return address

    @pytest.fixture
    def jp_server_config(
        self, jp_server_config: dict[str, Any], elsewhere: discovery.PoolAddress, tmp_path: Path
    ) -> dict[str, Any]:
        (tmp_path / "token").write_text(f"{elsewhere.token}\n")
        jp_server_config["GPUPool"] = {"url": elsewhere.url, "token_file": str(tmp_path / "token")}
        return jp_server_config

    async def test_is_joined_and_nothing_is_hosted(
        self,
        pool: PoolClient,
        jp_fetch: Callable[..., Any],
        jp_ws_fetch: Callable[..., Any],
        jp_serverapp: Any,
        kernelspec: Callable[..., str],
    ) -> None:
        heard: list[str] = []

        async def note(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
            heard.append(data["state"])

        jp_serverapp.event_logger.add_listener(schema_id=SCHEMA_ID, listener=note)
        (extension,) = jp_serverapp.extension_manager.extension_apps["jupyter_gpupool"]
        await jp_fetch(*API, "pool")  # joins it
        for poller in extension.pool._joined._pollers:
            await poller.begun.wait()
        socket = await jp_ws_fetch(*API, "events")
        state = await hear(socket)
        assert state["type"] == "state"
        assert len(state["gpus"]) == len(pool.pool()["servers"][0]["gpus"])
        kernel = json.loads(
            (await jp_fetch("api", "kernels", method="POST", body=json.dumps({"name": kernelspec()}))).body
        )
        (there,) = await asyncio.to_thread(pool.leases)
        (here,) = json.loads((await jp_fetch(*API, "leases")).body)["leases"]
        assert here["id"] == there.id
        assert here["state"] == "ACTIVE"
        await until(lambda: "ACTIVE" in heard, "what happens there is an event here")
        while there.id not in (await hear(socket)).get("leases", {}):
            pass
        socket.close()
        # The feed is that of the pool itself, in which who comes back goes on.
        again = await jp_ws_fetch(*API, "events", params={"feed": state["feed"], "seq": state["seq"]})
        assert (await hear(again))["type"] == "resumed"
        while there.id not in (await hear(again)).get("leases", {}):
            pass
        again.close()
        await jp_fetch("api", "kernels", kernel["id"], method="DELETE")
        assert not await asyncio.to_thread(pool.leases)
        await until(lambda: "RELEASED" in heard, "so is its end")

    async def test_that_is_away_is_a_readable_refusal(
        self, jp_fetch: Callable[..., Any], jp_ws_fetch: Callable[..., Any], jp_serverapp: Any, elsewhere: Any
    ) -> None:
        (extension,) = jp_serverapp.extension_manager.extension_apps["jupyter_gpupool"]
        await extension.pool.stop()
        extension.pool._stopped = False
        extension.pool.url = "http://127.0.0.1:9"
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch(*API, "pool")
        assert refused.value.code == 502
        assert "http://127.0.0.1:9" in json.loads(refused.value.response.body)["message"]
        socket = await jp_ws_fetch(*API, "events")
        assert await asyncio.wait_for(socket.read_message(), PATIENCE_S) is None
        assert "http://127.0.0.1:9" in socket.close_reason


class TestAPoolThatIsNotShared:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        jp_server_config["GPUPool"] = {"share": False}
        return jp_server_config

    async def test_still_lends_to_this_servers_kernels(
        self, jp_fetch: Callable[..., Any], kernelspec: Callable[..., str]
    ) -> None:
        assert discovery.find() is None
        body = json.dumps({"name": kernelspec()})
        kernel = json.loads((await jp_fetch("api", "kernels", method="POST", body=body)).body)
        (lease,) = json.loads((await jp_fetch(*API, "leases")).body)["leases"]
        assert lease["state"] == "ACTIVE"
        await jp_fetch("api", "kernels", kernel["id"], method="DELETE")
        assert not json.loads((await jp_fetch(*API, "leases")).body)["leases"]
