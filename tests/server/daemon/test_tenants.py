"""Two tenants of one secured server, its administrators, and what each of them can see and do."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jupyter_gpupool.client import event_stream, requests
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import (
    ImpossibleRequest,
    InvalidRequest,
    NamespaceConflict,
    PermissionDenied,
    RequestConflict,
    UnknownLease,
    UnknownNamespace,
)
from jupyter_gpupool.core.models import Lease, LeaseState

from ...conftest import PATIENCE_S
from .conftest import Server, gpupool
from .test_tokens import hold


def tenant(server: Server, name: str, *users: str, **fields: Any) -> list[PoolClient]:
    """A namespace and a client of each user's in it."""
    server.administrator().create_namespace(name, fields)
    return [server.client(server.token(namespace=name, owner=user)["token"]) for user in users]


def slices(client: PoolClient) -> list[dict[str, Any]]:
    return [piece for s in client.pool()["servers"] for gpu in s["gpus"] for piece in gpu["slices"]]


def guesses(lease: Lease) -> list[str]:
    """Ids that somebody who may not know it could try."""
    last = int(lease.id[-1], 16)
    return [lease.id, lease.id[:-1] + f"{last ^ 1:x}", str(uuid.uuid4()), lease.id.upper()]


def test_neither_sees_nor_touches_the_others(server: Server) -> None:
    (ada,) = tenant(server, "red", "ada")
    (eve,) = tenant(server, "blue", "eve")
    lease, _, line = hold(ada)
    for id in guesses(lease):
        attempts: list[tuple[Callable[..., Any], tuple]] = [
            (eve.lease, ()),
            (eve.heartbeat, ()),
            (eve.release, ()),
            (eve.resize, (0.2,)),
            (eve.extend, (60,)),
            (eve.ask, ("please",)),
            (eve.keep, ()),
        ]
        for attempt, more in attempts:
            with pytest.raises(UnknownLease) as refused:
                attempt(id, *more)
            assert "ada" not in str(refused.value) and "red" not in str(refused.value)
    same = type(lease.request)(**{**vars(lease.request), "namespace": "blue", "secret_sha256": "0" * 64})
    with pytest.raises(RequestConflict, match="is taken") as taken:
        eve.request(same)
    assert "ada" not in str(taken.value)
    assert eve.leases() == eve.leases(include_ended=True) == []
    assert [(piece["lease"], piece["owner"], piece["label"]) for piece in slices(eve)] == [(None, None, "")]
    assert [of["name"] for of in eve.namespaces()] == ["default", "blue"]
    for wrong in (
        lambda: eve.change_namespace("red", {"description": "mine"}),
        lambda: eve.set_member("red", "eve", "administer"),
        lambda: eve.remove_member("red", "ada"),
    ):
        with pytest.raises(UnknownNamespace) as unknown:
            wrong()
        assert "ada" not in str(unknown.value)
    for forbidden in (
        lambda: eve.create_namespace("mine", {}),
        lambda: eve.delete_namespace("blue"),
        lambda: eve.change_namespace("blue", {"limits": {"gpus": 100}}),
        lambda: eve.set_member("blue", "eve", "administer"),
        lambda: eve.audit(),
    ):
        with pytest.raises(PermissionDenied):
            forbidden()
    request, _ = requests.new_request(partial=0.1)
    with pytest.raises(PermissionDenied, match="of the namespace 'blue', not 'red'"):
        eve.request(type(request)(**{**vars(request), "namespace": "red"}))
    assert ada.lease(lease.id).state is LeaseState.ACTIVE and ada.lease(lease.id).asked_back == ()
    line.release()
    ada.release(lease.id)


def test_who_one_is(server: Server) -> None:
    (bob,) = tenant(server, "green", "bob")
    assert bob.whoami() == {
        "owner": "bob",
        "administers": False,
        "namespace": "green",
        "role": "use",
        "namespaces": {"default": "use", "green": "use"},
    }
    admin = server.administrator()
    assert admin.whoami()["administers"] and admin.whoami()["role"] == "administer"
    admin.set_member("green", "bob", "view")
    assert bob.whoami()["role"] == "view"
    with pytest.raises(PermissionDenied, match="may look at the namespace 'green', not use it"):
        hold(bob)
    admin.remove_member("green", "bob")
    assert bob.whoami()["role"] is None
    with pytest.raises(PermissionDenied, match="not a member of the namespace 'green'"):
        hold(bob)
    refused = [entry for entry in admin.audit() if entry["action"] == "refuse" and entry["actor"] == "bob"]
    assert len(refused) <= 2  # the last may be written a moment later


def test_colleagues_who_know_each_other(server: Server) -> None:
    """One sees what the other holds, and asks for it; the holder hears of it and answers."""
    cyd, dan = tenant(server, "open", "cyd", "dan", names_holders=True)
    lease, _, line = hold(cyd)
    assert [(piece["lease"], piece["owner"], piece["label"]) for piece in slices(dan)] == [
        (lease.id, "cyd", "")
    ]
    with pytest.raises(UnknownLease):
        dan.lease(lease.id)
    with pytest.raises(UnknownLease):
        dan.release(lease.id)
    assert dan.ask(lease.id, "until noon?") == {"lease": lease.id, "owner": "cyd"}
    (asked,) = cyd.lease(lease.id).asked_back
    assert (asked.by, asked.message) == ("dan", "until noon?") and abs(asked.at - time.time()) < 60
    assert cyd.keep(lease.id).asked_back == ()
    assert [of["members"] for of in dan.namespaces() if of["name"] == "open"] == [
        {"cyd": "use", "dan": "use"}
    ]

    async def watched() -> None:
        """What is told to who watches is narrowed as what is answered, and again when rights change."""
        for client, leases in ((cyd, [lease.id]), (dan, []), (server.administrator(), [lease.id])):
            socket = await event_stream.connect(client, {})
            state = json.loads(await socket.read_message() or "")
            pool = await asyncio.to_thread(client.pool)
            told = [gpu["slices"] for gpu in state["gpus"].values()]
            assert told == [gpu["slices"] for gpu in pool["servers"][0]["gpus"]]
            assert list(state["leases"]) == leases
            if client is not dan:
                socket.close()
                continue
            admin = server.administrator()
            await asyncio.to_thread(admin.change_namespace, "open", {"names_holders": False})
            while not (gpus := json.loads(await socket.read_message() or "").get("gpus")):
                pass
            (changed,) = gpus.values()
            assert [piece["owner"] for piece in changed["slices"]] == [None]
            socket.close()

    asyncio.run(asyncio.wait_for(watched(), PATIENCE_S))
    line.release()
    cyd.release(lease.id)


def test_an_administrator_of_a_namespace(server: Server, eventually: Callable[..., Any]) -> None:
    boss, fay = tenant(server, "team", "boss", "fay", limits={"gpus": 1.0, "lease_s": 3600})
    server.administrator().set_member("team", "boss", "administer")
    lease, _, _line = hold(fay)
    assert lease.expires_at is not None and abs(lease.expires_at - time.time() - 3600) < 60
    assert [found.id for found in boss.leases()] == [lease.id] and boss.leases(mine=True) == []
    assert slices(boss)[0]["owner"] == "fay"
    changed = boss.change_namespace("team", {"limits": {"gpus": 0.5}, "description": "ours"})
    assert changed["limits"]["gpus"] == 0.5 and changed["ceiling"]["gpus"] == 1.0
    assert changed["held"] == {"memory_mib": 3251, "gpus": 0.1, "leases": 1}
    with pytest.raises(PermissionDenied, match="allows gpus up to 1, not 2"):
        boss.change_namespace("team", {"limits": {"gpus": 2}})
    with pytest.raises(ImpossibleRequest, match="may hold 0.5 GPUs"):
        fay.resize(lease.id, 0.6)
    with pytest.raises(ImpossibleRequest, match="last 1 h at most, counted from now"):
        fay.extend(lease.id, 7200)
    request, _ = requests.new_request(num_gpus=2, partial=0.3)
    assert fay.forecast(request)["outcome"] == "impossible"
    with pytest.raises(ImpossibleRequest, match="may hold 0.5 GPUs, and this is 0.6 more"):
        fay.request(request)
    admin = server.administrator()
    with pytest.raises(NamespaceConflict, match="release them first"):
        admin.delete_namespace("team")
    assert boss.release(lease.id).state is LeaseState.RELEASED
    with pytest.raises(NamespaceConflict, match="revoke them first"):
        admin.delete_namespace("team")

    def entries() -> list[tuple[str, str]]:
        return [(entry["action"], entry["actor"]) for entry in admin.audit() if entry["subject"] == lease.id]

    eventually(
        lambda: entries() == [("request", "fay"), ("grant", ""), ("release", "boss")], "the trail has it all"
    )
    assert [row["name"] for row in fay.usage()["rows"]] == ["fay"]
    assert boss.usage("namespace")["rows"] == [], "those of others are for the pool's administrator"
    usage = {row["name"]: row for row in admin.usage("namespace")["rows"]}
    assert usage["team"]["leases"] == 1 and 0 < usage["team"]["granted_h"] < 0.1


def test_a_lease_ends_when_its_time_is_over(server: Server, eventually: Callable[..., Any]) -> None:
    (gil,) = tenant(
        server, "brief", "gil", limits={"lease_s": 20}
    )  # a busy machine needs a part of it to attach
    lease, _, line = hold(gil)
    eventually(lambda: not line.alive, "the worker ends, and its holder is told")
    ended = eventually(lambda: (now := gil.lease(lease.id)).state.ended and now, "the lease ends")
    assert ended.state is LeaseState.EXPIRED and "'brief' last 20 s at most" in ended.reason


def test_a_lease_that_computes_nothing_ends(server: Server, eventually: Callable[..., Any]) -> None:
    (hal,) = tenant(server, "busy", "hal", limits={"idle_s": 20})
    lease, _, line = hold(hal)
    told = eventually(lambda: hal.lease(lease.id).idle_since, "it is told as idle")
    assert abs(told - time.time()) < 60
    eventually(lambda: not line.alive, "the worker ends, and its holder is told")
    ended = eventually(lambda: (now := hal.lease(lease.id)).state.ended and now, "the lease ends")
    assert ended.state is LeaseState.RELEASED and "computed nothing for 20 s" in ended.reason


def test_calls_that_make_no_sense(server: Server) -> None:
    admin = server.administrator()
    for wrong in (
        lambda: admin.create_namespace("a b", {}),
        lambda: admin.create_namespace("x", {"limit": {}}),
        lambda: admin.create_namespace("x", {"limits": {"gpus": "many"}}),
        lambda: admin.set_member("default", "ada", "owner"),
        lambda: admin._call("POST", "/namespaces", None, {}),
        lambda: admin._call("PUT", "/namespaces/default/members/ada", None, {}),
        lambda: admin.audit(limit=0),
        lambda: admin.usage("room"),
    ):
        with pytest.raises(InvalidRequest):
            wrong()
    with pytest.raises(UnknownNamespace):
        admin.change_namespace("nowhere", {})
    with pytest.raises(NamespaceConflict):
        admin.delete_namespace("default")
    admin.set_member("default", "søren/é %2F", "view")
    assert admin.namespaces()[0]["members"] == {"søren/é %2F": "view"}
    assert admin.remove_member("default", "søren/é %2F")["members"] == {}
    response = httpx.get(f"{server.url}/gpupool/api/v1/namespaces", verify=False, timeout=PATIENCE_S)
    assert response.status_code == 401


def test_by_the_commands(server: Server) -> None:
    admin = {"GPUPOOL_CONFIG_DIR": str(server.folder / "admin")}

    def said(*words: object) -> str:
        done = gpupool(*words, **admin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    limits = ("--gpus", 1.5, "--user-share", 0.5, "--longest", "2h", "--idle", "30m", "--weight", 2)
    assert "gpupool token create --namespace lab" in said("namespace", "create", "lab", *limits)
    said("namespace", "add", "lab", "ida", "--role", "administer")
    said("namespace", "set", "lab", "--reclaim", "never")
    chosen = {of["name"]: of["reclaim"] for of in json.loads(said("namespace", "list", "--json"))}
    assert (chosen["default"], chosen["lab"]) == (None, "never")
    said("namespace", "set", "lab", "--idle", "none", "--leases", 3, "--names-holders", "yes")
    listed = {of["name"]: of for of in json.loads(said("namespace", "list", "--json"))}["lab"]
    assert listed["limits"] == {
        "memory_mib": None,
        "gpus": 1.5,
        "leases": 3,
        "user_share": 0.5,
        "lease_s": 7200,
        "idle_s": None,
        "reclaim_after_s": None,
    }
    assert listed["weight"] == 2 and listed["names_holders"] and listed["members"] == {"ida": "administer"}
    row = next(line for line in said("namespace", "list").splitlines() if line.startswith("lab"))
    assert "0 of 1.5" in row and "2 h" in row and "ida (administer)" in row
    ida = server.client(server.token(namespace="lab", owner="ida")["token"])
    lease, _, line = hold(ida)
    assert re.search(r"  (2 h|1 h 5\d min)  ", said("leases")), (
        "less than half a second, or more, after the grant"
    )
    ida.heartbeat(lease.id)  # starting a command takes a while
    refused = gpupool("extend", lease.id[:8], "--by", "1h", **admin)
    assert refused.returncode == 1 and "last 2 h at most, counted from now" in refused.stderr
    ida.heartbeat(lease.id)
    assert "starts anew" in said("keep", lease.id[:8])
    ida.heartbeat(lease.id)
    said("release", lease.id)
    line.release()
    said("namespace", "remove", "lab", "ida")
    usage = json.loads(said("usage", "--since", "1h", "--by", "user", "--json"))
    assert next(row for row in usage["rows"] if row["name"] == "ida")["leases"] == 1
    by_gpu = list(csv.DictReader(io.StringIO(said("usage", "--by", "gpu", "--csv"))))
    assert {"gpu", "granted_h", "computing_h", "idle_h", "unknown_h"} < set(by_gpu[0])
    shown = said("usage", "--by", "user")
    assert re.search(r"^ida +1 +0\.\d\d ", shown, re.M) and "GPU-hours since" in shown
    trail = said("audit", "--since", "1h", "--limit", 1000)
    for words in ("namespace create", "member set", "token create", "grant", "release", "member remove"):
        assert words in trail
    unknown = gpupool("namespace", "delete", "nowhere", **admin)
    assert unknown.returncode == 1 and "no namespace 'nowhere'" in unknown.stderr
    for words, why in (
        (("namespace",), "list, create, set, delete, add or remove"),
        (("namespace", "set", "lab"), "nothing to change"),
        (("namespace", "create", "x", "--gpus", "many"), "none for no limit"),
        (("namespace", "add", "lab", "ada", "--role", "own"), "--role"),
        (("extend", "abc", "--by", "soon"), "90m or 2h"),
        (("audit", "--limit", "0"), "from 1 to 1000"),
        (("usage", "--csv", "--json"), "either --csv or --json"),
        (("usage", "--by", "room"), "--by"),
    ):
        wrong = gpupool(*words, **admin)
        assert wrong.returncode == 2 and why in wrong.stderr and len(wrong.stderr.splitlines()) == 1, (
            wrong.stderr
        )
