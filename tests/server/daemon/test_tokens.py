"""Who is admitted to a secured server, to what, until when; and who is not."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import sqlite3
import ssl
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.client import bundle, pool_finder, requests
from jupyter_gpupool.core.errors import (
    InvalidRequest,
    NotSupported,
    PermissionDenied,
    RequestConflict,
    TooManyAttempts,
    Unauthenticated,
    UnknownLease,
    UnknownNamespace,
)
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.transport import frames, handshake
from jupyter_gpupool.transport.lifeline import Lifeline

from ...conftest import PATIENCE_S
from .conftest import Server, gpupool


def hold(client: Any) -> tuple[Lease, str, Lifeline]:
    request, secret = requests.new_request(partial=0.1)
    lease = requests.acquire(client, request)
    return lease, secret, Lifeline(requests.attach_spec(client, lease, secret, "remote"))


def test_by_the_commands(server: Server, tmp_path: Path) -> None:
    """An administrator admits somebody, who uses it; is extended, listed, revoked."""
    admin = {"GPUPOOL_CONFIG_DIR": str(server.folder / "admin")}
    archive = tmp_path / "ada.tar"
    made = gpupool(
        "token", "create", "--description", "ada's laptop", "--expires", "1h", "--output", archive, **admin
    )
    assert made.returncode == 0, made.stderr
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    again = gpupool("token", "create", "--description", "x", "--output", archive, **admin)
    assert again.returncode == 1 and "The new token has been revoked" in again.stderr
    home = tmp_path / "home" / ".gpupool"
    home.mkdir(parents=True)
    assert os.system(f"tar -xf {archive} -C {home}") == 0
    for file in home.iterdir():
        file.chmod(0o400)  # servers.conf and the others may be read-only
    home.chmod(0o500)
    ada = {"HOME": str(tmp_path / "home")}
    without = {k: v for k, v in os.environ.items() if k != "GPUPOOL_CONFIG_DIR"}
    os.environ.pop("GPUPOOL_CONFIG_DIR")
    try:
        used = gpupool("run", "-p", "0.1", "--", "true", **ada)
        assert used.returncode == 0, used.stderr
        assert f"localhost {server.data_port} " in used.stderr
        refused = gpupool("token", "list", **ada)
        assert refused.returncode == 1 and "requires an administrator token" in refused.stderr
    finally:
        os.environ.update(without, GPUPOOL_CONFIG_DIR=str(tmp_path))
    listed = json.loads(gpupool("token", "list", "--json", **admin).stdout)
    token = next(t for t in listed if t["description"] == "ada's laptop")
    assert token["state"] == "valid" and token["last_used_at"] is not None and "sha256" not in token
    assert "valid until" in gpupool("token", "extend", token["id"][:6], "--expires", "2y", **admin).stdout
    assert "Revoked token" in gpupool("token", "revoke", token["id"], **admin).stdout
    assert re.search(rf"{token['id']}\s+revoked", gpupool("token", "list", **admin).stdout)
    unknown = gpupool("token", "revoke", "ffffffffffff0", **admin)
    assert unknown.returncode == 1 and "see gpupool token list" in unknown.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create",), "--description"),
        (("create", "--description", "x", "--expires", "soon"), "365d"),
        (("create", "--description", "x", "--expires", "0d"), "365d"),
        ((), "create, list, extend or revoke"),
        (("list",), "to the administrator's bundle"),
    ],
)
def test_bad_input(words: tuple[str, ...], said: str) -> None:
    done = gpupool("token", *words)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_pool_of_ones_own_has_no_tokens(tmp_path: Path) -> None:
    from jupyter_gpupool.client.http import PoolClient

    client, _ = pool_finder.find_pool()
    assert isinstance(client, PoolClient)
    with pytest.raises(NotSupported, match="gpupool server init"):
        client.tokens()
    client.close()


def test_every_refusal_says_what_to_do(server: Server) -> None:
    admin = server.administrator()
    with pytest.raises(Unauthenticated, match="requires its token"):
        server.client("").pool()
    wrong = f"{'0' * 12}.{'A' * 43}"
    with pytest.raises(Unauthenticated, match="does not know that token; check client.yaml, or ask"):
        server.client(wrong).pool()
    good = server.token()
    almost = good["token"][:-1] + ("A" if good["token"][-1] != "A" else "B")
    with pytest.raises(Unauthenticated, match="does not know that token"):
        server.client(almost).pool()
    client = server.client(good["token"])
    assert client.pool()["healthy"]
    admin.extend_token(good["id"], 0.01)
    time.sleep(0.02)
    with pytest.raises(
        Unauthenticated, match=r"Token expired at: 20..-..-..T..:..:..Z; .*gpupool token extend [0-9a-f]{12}"
    ):
        client.pool()
    admin.extend_token(good["id"], 60)
    assert client.pool()["healthy"], "the client has what it had before"
    admin.revoke_token(good["id"])
    with pytest.raises(Unauthenticated, match="Token revoked at: .*ask the pool's administrator for another"):
        client.pool()
    with pytest.raises(InvalidRequest, match="was revoked, which is for good"):
        admin.extend_token(good["id"], 60)
    with pytest.raises(PermissionDenied, match="requires an administrator token"):
        server.client(server.token()["token"]).tokens()


def test_a_server_of_another_authority_is_not_spoken_to(server: Server, tmp_path: Path) -> None:
    """Nothing of the token leaves the client, which says what is amiss."""
    assert gpupool("server", "init", tmp_path / "other", "--address", "localhost").returncode == 0
    home = tmp_path / "bundle"
    server.bundle(home)
    (home / bundle.CA).write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    refused = gpupool("leases", GPUPOOL_CONFIG_DIR=str(home))
    assert refused.returncode == 1 and "ca.crt" in refused.stderr, refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_only_hashes_are_kept(own_server: Server) -> None:
    """Neither the ledger nor the log has what is shown for a token."""
    token = own_server.token()["token"]
    own_server.client(token).pool()
    assert own_server.stop() == 0
    secret = token.partition(".")[2].encode()
    for file in [*own_server.folder.rglob("ledger.sqlite*"), own_server.folder.parent / "log"]:
        assert secret not in file.read_bytes(), file
    with sqlite3.connect(own_server.folder / "ledger.sqlite") as ledger:
        kept = {row[0] for row in ledger.execute("SELECT sha256 FROM tokens")}
    assert hashlib.sha256(token.encode()).hexdigest() in kept


def test_the_leases_of_others(server: Server) -> None:
    """Neither by id nor by the same id: one tenant sees, keeps, resizes and releases its own only."""
    ada, eve = (server.client(server.token(name)["token"]) for name in ("ada", "eve"))
    lease, secret, line = hold(ada)
    for attempt in (
        lambda: eve.lease(lease.id),
        lambda: eve.heartbeat(lease.id),
        lambda: eve.release(lease.id),
        lambda: eve.resize(lease.id, 0.2),
        lambda: eve.wait(lease.id, lease, 0.1),
    ):
        with pytest.raises(UnknownLease):
            attempt()
    request, _ = requests.new_request(partial=0.1)
    same = type(request)(**{**vars(request), "id": lease.id})
    with pytest.raises(RequestConflict, match="is taken"):
        eve.request(same)
    assert eve.leases() == [] and [found.id for found in ada.leases()] == [lease.id]
    slices = [piece for s in eve.pool()["servers"] for gpu in s["gpus"] for piece in gpu["slices"]]
    assert [(piece["lease"], piece["owner"]) for piece in slices] == [(None, None)]
    admin = server.administrator()
    assert [found.id for found in admin.leases()] == [lease.id] and admin.leases(mine=True) == []
    # The data port tells eve no more: she may name the lease, its secret she does not have.
    spec = requests.attach_spec(eve, lease, "a guess", "remote")
    with pytest.raises(handshake.Refused, match="the secret is not this lease's"):
        handshake.connect(spec, "holder", {})
    line.release()
    ada.release(lease.id)
    with pytest.raises(frames.ConnectionLost, match="has the lease ended"):
        handshake.connect(requests.attach_spec(ada, lease, secret, "remote"), "holder", {})


def test_a_token_is_of_its_namespace(server: Server) -> None:
    with pytest.raises(UnknownNamespace, match="gpupool namespace create"):
        server.token(namespace="cnasg")
    server.administrator().create_namespace("cnasg", {})
    server.administrator().create_namespace("another", {})
    client = server.client(server.token(namespace="cnasg")["token"])
    request, _ = requests.new_request(partial=0.1)
    lease = client.request(request)
    assert lease.request.namespace == "cnasg"
    client.release(lease.id)
    other, _ = requests.new_request(partial=0.1)
    with pytest.raises(PermissionDenied, match="of the namespace 'cnasg', not 'another'"):
        client.request(type(other)(**{**vars(other), "namespace": "another"}))


def test_what_runs_survives_an_expiry_and_not_a_cut(server: Server, eventually: Callable[..., Any]) -> None:
    admin = server.administrator()
    token = server.token()
    client = server.client(token["token"])
    lease, _, line = hold(client)
    admin.extend_token(token["id"], 0.01)
    time.sleep(0.02)
    assert client.heartbeat(lease.id).state is LeaseState.ACTIVE
    with pytest.raises(Unauthenticated, match="Token expired at"):
        client.resize(lease.id, 0.2)
    with pytest.raises(Unauthenticated, match="Token expired at"):
        hold(client)
    admin.revoke_token(token["id"], end_leases=True)
    eventually(lambda: not line.alive, "the holder is told")
    assert admin.lease(lease.id).reason == "its token was revoked"
    assert admin.leases() == []


def test_a_cut_reaches_a_lease_that_the_server_has_not_heard_of_since_its_start(
    own_server: Server, eventually: Callable[..., Any]
) -> None:
    """The server is killed and started, and the token revoked at once: the next heartbeat is the last."""
    token = own_server.token()
    client = own_server.client(token["token"])
    lease, _, line = hold(client)
    own_server.stop(signal.SIGKILL)
    own_server.start()
    own_server.administrator().revoke_token(token["id"], end_leases=True)
    assert line.alive, "nothing has told the server whose it is"
    with pytest.raises(Unauthenticated, match="Token revoked"):
        client.heartbeat(lease.id)
    eventually(lambda: not line.alive, "the holder is told")


def test_guessing_is_throttled_and_disturbs_nobody_else(own_server: Server) -> None:
    known = own_server.token()["token"]
    guesses = [f"{uuid.uuid4().hex[:12]}.{'A' * 43}" for _ in range(10)]
    for guess in guesses:
        with pytest.raises(Unauthenticated):
            own_server.client(guess).pool()
    with pytest.raises(TooManyAttempts, match="try again in [0-9]+ s"):
        own_server.client(guesses[0]).pool()
    assert own_server.client(known).pool()["healthy"], "of the same address, with a token that is right"


def test_requests_that_no_client_makes(server: Server) -> None:
    token = server.token()["token"]
    trusting = ssl.create_default_context(cadata=server.ca)

    def status(path: str, **headers: str) -> int:
        """Of a request with just that path, which no library has made a proper one of."""
        connection = http.client.HTTPSConnection(
            "localhost", server.port, context=trusting, timeout=PATIENCE_S
        )
        connection.putrequest("GET", path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        try:
            return connection.getresponse().status
        finally:
            connection.close()

    known = {"Authorization": f"Bearer {token}"}
    assert status("/gpupool/api/v1/pool", **known) == 200
    for path in (
        "/gpupool/api/v1/../../../etc/passwd",
        "/gpupool/api/v1/leases/..%2f..%2fetc%2fpasswd",
        "/gpupool/api/v1/leases/%00",
        "/gpupool/api/v1/tokens/../pool",
        "//gpupool/api/v1/pool",
        "/gpupool/api/v1/pool/",
        "/",
        "*",
    ):
        assert status(path, **known) in (400, 404), path
    for value in (
        "",
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        f"Bearer {token} x",
        "Bearer \xff",
        f"Bearer {token},{token}",
    ):
        assert status("/gpupool/api/v1/pool", Authorization=value) == 401, value
    assert status(f"/gpupool/api/v1/pool?token={token}") == 401
    for name, value in (
        ("X_Forwarded_For", "127.0.0.1"),
        ("X_Forwarded_User", "administrator"),
        ("Cookie", f"token={token}"),
    ):
        assert status("/gpupool/api/v1/pool", **{name: value}) == 401
    body = {"description": "x", "expires_s": 10**30}
    with pytest.raises(InvalidRequest, match="hundred years"):
        server.administrator().create_token(**body)  # type: ignore[arg-type]


def test_a_bundle_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(bundle.VARIABLE, str(tmp_path))
    assert bundle.find() is None
    for name, text, said in (
        (bundle.SERVERS, "servers: nothing", "names no server as it should"),
        (bundle.SERVERS, "servers: [{addresses: ['gpus.example']}]", "names no server as it should"),
        (bundle.SERVERS, "servers: [{addresses: ['gpus.example:56001']}]", "no ca.crt"),
        (bundle.CLIENT, "token: [1]", "holds no token"),
        (bundle.CLIENT, "{", "holds no token"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidRequest, match=said):
            bundle.find()
    (tmp_path / bundle.CLIENT).write_text("token: abc")
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / bundle.CA).write_text("no certificate")
    with pytest.raises(InvalidRequest, match=r"ca\.crt contains no certificate"):
        pool_finder.find_pool()
