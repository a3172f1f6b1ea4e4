"""Tokens that may do less than their user."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jupyter_gpupool.client import requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import InvalidRequest, PermissionDenied
from jupyter_gpupool.core.models import Lease

from ...conftest import PATIENCE_S
from .conftest import Server, gpupool


def held(client: PoolClient) -> Lease:
    request, _ = requests.new_request(partial=0.1)
    return client.request(request)


def test_a_token_that_reads_changes_nothing(server: Server) -> None:
    ada, reader = (server.client(server.token(owner="ada", scope=s)["token"]) for s in ("lease", "read"))
    lease = held(ada)
    assert [found.id for found in reader.leases()] == [lease.id] and reader.pool()["healthy"]
    assert reader.whoami()["owner"] == "ada" and reader.forecast(requests.new_request(partial=0.1)[0])
    changes: list[Callable[[], Any]] = [
        lambda: held(reader),
        lambda: reader.heartbeat(lease.id),
        lambda: reader.resize(lease.id, 0.2),
        lambda: reader.extend(lease.id, 60.0),
        lambda: reader.keep(lease.id),
        lambda: reader.ask(lease.id),
        lambda: reader.release(lease.id),
        lambda: reader.change_namespace("default", {"description": "y"}),
    ]
    for change in changes:
        with pytest.raises(PermissionDenied, match="this token's scope is read, and the call needs"):
            change()
    assert ada.release(lease.id).state.ended


def test_a_token_that_leases_administers_nothing(server: Server) -> None:
    admin = server.administrator()
    admin.create_namespace("lab", {"members": {"lead": "administer"}})
    lead, leasing = (
        server.client(server.token(owner="lead", namespace="lab", scope=s)["token"])
        for s in ("administer", "lease")
    )
    assert lead.change_namespace("lab", {"description": "x"})["description"] == "x"
    assert leasing.release(held(leasing).id).state.ended
    changes: list[Callable[[], Any]] = [
        lambda: leasing.change_namespace("lab", {"description": "y"}),
        lambda: leasing.set_member("lab", "eve", "use"),
        lambda: leasing.remove_member("lab", "eve"),
        lambda: leasing.create_namespace("more", {}),
        lambda: leasing.delete_namespace("lab"),
    ]
    for change in changes:
        with pytest.raises(PermissionDenied, match="scope is lease, and the call needs administer"):
            change()


def test_an_administrators_token_of_a_smaller_scope(server: Server) -> None:
    """A monitoring system reads everything; a program that leases does so as its user, not as the administrator."""
    reader, leasing = (
        server.client(server.token(owner="ops", administers=True, scope=s)["token"])
        for s in ("read", "lease")
    )
    ada = server.client(server.token(owner="ada")["token"])
    lease = held(ada)
    assert lease.id in [found.id for found in reader.leases()]
    assert reader.tokens() and reader.audit()
    with httpx.Client(verify=reader.context, trust_env=False, timeout=PATIENCE_S) as http:
        assert http.get(f"{server.url}/metrics", headers=reader.headers).status_code == 200
    for client in (reader, leasing):
        administered: list[Callable[[], Any]] = [
            lambda client=client: client.create_token("more", 60.0),
            lambda client=client: client.drain("nowhere"),
            lambda client=client: client.create_namespace("more", {}),
            lambda client=client: client.revoke_token("0" * 12),
            lambda client=client: client.extend_token("0" * 12, 60.0),
        ]
        for change in administered:
            with pytest.raises(PermissionDenied, match="the call needs administer|an administrator token"):
                change()
    with pytest.raises(Exception, match="no lease"):
        leasing.release(lease.id)
    assert leasing.release(held(leasing).id).state.ended
    assert ada.release(lease.id).state.ended


def test_a_token_of_one_namespace_changes_nothing_elsewhere(server: Server) -> None:
    admin = server.administrator()
    for name in ("here", "there"):
        admin.create_namespace(name, {"members": {"bob": "administer"}})
    bob, confined = (
        server.client(server.token(owner="bob", namespace=namespace, one_namespace=only)["token"])
        for namespace, only in (("there", False), ("here", True))
    )
    elsewhere, own = held(bob), held(confined)
    assert {found.id for found in confined.leases()} == {elsewhere.id, own.id}, "it reads what its user may"
    changes: list[Callable[[], Any]] = [
        lambda: confined.release(elsewhere.id),
        lambda: confined.heartbeat(elsewhere.id),
        lambda: confined.resize(elsewhere.id, 0.2),
        lambda: confined.keep(elsewhere.id),
        lambda: confined.ask(elsewhere.id),
        lambda: confined.change_namespace("there", {"description": "y"}),
        lambda: confined.set_member("there", "eve", "use"),
        lambda: confined.remove_member("there", "bob"),
    ]
    for change in changes:
        with pytest.raises(PermissionDenied, match="changes nothing outside of the namespace 'here'"):
            change()
    assert confined.change_namespace("here", {"description": "x"})["description"] == "x"
    assert confined.release(own.id).state.ended and bob.release(elsewhere.id).state.ended


def test_scopes_that_make_no_sense(server: Server) -> None:
    with pytest.raises(InvalidRequest, match="a scope is read, lease, administer"):
        server.token(scope="everything")
    with pytest.raises(InvalidRequest, match="scope"):
        server.token(scope=["read"])
    with pytest.raises(InvalidRequest, match="an administrator's token is for all namespaces"):
        server.token(administers=True, one_namespace=True)


def test_the_commands_create_and_show_scopes_and_the_last_use_outlives_the_server(own_server: Server) -> None:
    admin = {"GPUPOOL_CONFIG_DIR": str(own_server.folder / "admin")}
    archive = own_server.folder.parent / "watch.tar"
    words = ("--description", "watch", "--scope", "read", "--one-namespace", "--output", archive)
    made = gpupool("token", "create", *words, **admin)
    assert made.returncode == 0, made.stderr
    wrong = gpupool("token", "create", "--description", "x", "--scope", "all", **admin)
    assert wrong.returncode == 2 and "--scope" in wrong.stderr
    rows = gpupool("token", "list", **admin).stdout.splitlines()
    assert "SCOPE" in rows[0]
    assert any("read" in row and "default (only)" in row for row in rows[1:])
    made_here = own_server.token("used", scope="lease")
    own_server.client(made_here["token"]).whoami()
    assert own_server.stop() == 0
    with sqlite3.connect(own_server.folder / "ledger.sqlite") as ledger:
        row = ledger.execute(
            "SELECT scope, last_used_at IS NOT NULL FROM tokens WHERE id = ?", (made_here["id"],)
        ).fetchone()
    ledger.close()
    assert row == ("lease", 1)
