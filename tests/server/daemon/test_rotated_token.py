"""A bundle whose token is replaced while its client runs, as in a Pod's mounted Secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupyter_gpupool.client import bundle, pool_finder
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import Unauthenticated

from .conftest import Server


def test_a_client_goes_on_with_the_new_token(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPOOL_CONFIG_DIR", str(tmp_path))
    first = server.bundle(tmp_path, owner="pods")
    client, _ = pool_finder.find_pool()
    server.bundle(tmp_path, owner="pods")
    server.administrator().revoke_token(first["id"])
    assert client.whoami()["owner"] == "pods"
    with PoolClient(**client.settings()) as elsewhere:
        assert elsewhere.whoami()["owner"] == "pods"
    client.close()


@pytest.mark.parametrize("replaced", ["", "servers: []", "token: [no"])
def test_a_bundle_with_no_newer_token_changes_no_refusal(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: str
) -> None:
    monkeypatch.setenv("GPUPOOL_CONFIG_DIR", str(tmp_path))
    made = server.bundle(tmp_path)
    client, _ = pool_finder.find_pool()
    if replaced:
        (tmp_path / bundle.CLIENT).write_text(replaced)
    server.administrator().revoke_token(made["id"])
    with pytest.raises(Unauthenticated, match="revoked"):
        client.whoami()
    client.close()


def test_a_token_that_was_given_is_not_replaced(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPOOL_CONFIG_DIR", str(tmp_path))
    server.bundle(tmp_path)
    given = server.token()
    client, _ = pool_finder.find_pool(token=given["token"])
    server.administrator().revoke_token(given["id"])
    with pytest.raises(Unauthenticated):
        client.whoami()
    client.close()
