"""A Jupyter server with an administrator's bundle: what JupyterLab's Console asks of a secured server through it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import Authorizer
from tornado.httpclient import HTTPClientError

from jupyter_gpupool.client.http import PoolClient

from .conftest import Server

API = ("gpupool", "api", "v1")


class ReadersOnly(Authorizer):
    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return action == "read"


@pytest.fixture
def role() -> str:
    return "admin"


@pytest.fixture
def jp_server_config(
    server: Server, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    folder = server.folder / "admin"
    if role != "admin":
        folder = tmp_path / "bundle"
        server.bundle(folder, description="a user")
    monkeypatch.setenv("GPUPOOL_CONFIG_DIR", str(folder))
    for name in ("GPUPOOL_URL", "GPUPOOL_TOKEN"):  # which the extension sets for its kernels
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return {"ServerApp": {"jpserver_extensions": {"jupyter_gpupool": True}}}


async def refusal(call: Any) -> dict[str, Any]:
    with pytest.raises(HTTPClientError) as refused:
        await call
    return {"status": refused.value.code, **json.loads(refused.value.response.body)}


async def test_tokens_are_made_extended_and_revoked(server: Server, jp_fetch: Callable[..., Any]) -> None:
    body = json.dumps({"description": "ada's laptop", "expires_s": 3600})
    tar = await jp_fetch(*API, "tokens", method="POST", body=body, headers={"Accept": "application/x-tar"})
    assert tar.code == 201
    assert tar.headers["Content-Type"] == "application/x-tar"
    assert 'attachment; filename="gpupool-' in tar.headers["Content-Disposition"]
    assert tar.headers["Cache-Control"] == "no-store"
    with tarfile.open(fileobj=io.BytesIO(tar.body)) as archive:
        assert archive.getnames() == ["ca.crt", "client.yaml", "servers.conf"]
        client = archive.extractfile("client.yaml").read().decode()  # type: ignore[union-attr]
    shown = client.partition("token: ")[2].strip()
    with PoolClient(server.url, shown, ca=server.ca) as theirs:
        assert theirs.leases() == []

    listed = json.loads((await jp_fetch(*API, "tokens")).body)["tokens"]
    (mine,) = [token for token in listed if token["description"] == "ada's laptop"]
    assert mine["state"] == "valid" and shown not in json.dumps(listed)

    forever = json.dumps({"expires_s": None})
    extended = await jp_fetch(*API, "tokens", mine["id"], method="PATCH", body=forever)
    assert json.loads(extended.body)["expires_at"] is None
    gone = await jp_fetch(*API, "tokens", mine["id"], method="DELETE", params={"end_leases": "1"})
    assert json.loads(gone.body)["state"] == "revoked" and json.loads(gone.body)["cuts_leases"]


async def test_what_the_server_refuses_is_said_in_its_words(jp_fetch: Callable[..., Any]) -> None:
    said = await refusal(jp_fetch(*API, "tokens", method="POST", body="{}"))
    assert said["status"] == 400 and "description is missing" in said["message"]
    said = await refusal(jp_fetch(*API, "tokens", "nobody", method="DELETE"))
    assert said["status"] == 404 and said["error"] == "UnknownToken"
    said = await refusal(jp_fetch(*API, "tokens", method="POST", body="{"))
    assert said["status"] == 400 and "not JSON" in said["message"]


async def test_no_other_call_is_reached_that_way(jp_fetch: Callable[..., Any]) -> None:
    for path in (("tokens", "..", "leases"), ("tokens", ".."), ("tokens", "a", "b", "c", "d", "e")):
        assert (await refusal(jp_fetch(*API, *path)))["status"] == 404


class TestReaders:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        jp_server_config["ServerApp"]["authorizer_class"] = ReadersOnly
        return jp_server_config

    async def test_see_no_tokens(self, jp_fetch: Callable[..., Any]) -> None:
        await jp_fetch(*API, "pool")
        assert (await refusal(jp_fetch(*API, "tokens")))["status"] == 403
        body = json.dumps({"description": "mine"})
        assert (await refusal(jp_fetch(*API, "tokens", method="POST", body=body)))["status"] == 403


class TestAUser:
    @pytest.fixture
    def role(self) -> str:
        return "user"

    async def test_administers_nothing(self, jp_fetch: Callable[..., Any]) -> None:
        said = await refusal(jp_fetch(*API, "tokens"))
        assert said["status"] in (401, 403) and "administrator" in said["message"]


class TestAPoolOfOnesOwn:
    @pytest.fixture
    def jp_server_config(self) -> dict[str, Any]:
        return {
            "ServerApp": {"jpserver_extensions": {"jupyter_gpupool": True}},
            "LocalEngine": {"emulate": "always"},
        }

    async def test_says_how_to_have_tokens(self, jp_fetch: Callable[..., Any]) -> None:
        said = await refusal(jp_fetch(*API, "tokens"))
        assert said["status"] == 404 and said["error"] == "NotSupported"
        assert "gpupool server init" in said["message"]
        body = json.dumps({"draining": True})
        said = await refusal(jp_fetch(*API, "servers", "here", method="PATCH", body=body))
        assert said["status"] == 404 and "gpupool server drain" in said["message"]
