"""The controller's rounds, against an API server and a pool that only note what they are told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import NamespaceConflict, PoolError, PoolUnreachable, UnknownLease
from jupyter_gpupool.core.models import Lease, LeaseState, Parked, Request, Slice
from jupyter_gpupool.kubernetes.api_server import APIServer, APIServerError
from jupyter_gpupool.kubernetes.controller import Controller
from jupyter_gpupool.kubernetes.names import LIMITS, MANAGED, TOKEN_ID
from jupyter_gpupool.kubernetes.plan import Complain, IssueToken


class Cluster:
    """Lists one namespace. ``refuses``: it takes no Secret."""

    def __init__(self, limits: str = "gpus=1") -> None:
        metadata = {"name": "team", "annotations": {LIMITS: limits}, "labels": {MANAGED: "true"}}
        self.namespaces = [{"metadata": metadata}]
        self.applied: list[dict[str, Any]] = []  # Secrets
        self.events: dict[str, list[str]] = {}  # name → what it said in turn
        self.slices: dict[str, dict[str, Any]] = {}
        self.refuses = False
        self.pods: list[dict[str, Any]] = []
        self.listed: list[str] = []
        self.lagging: dict[str, list[dict[str, Any]]] = {}  # what is still seen of a kind

    def objects(self, kind: str) -> list[dict[str, Any]]:
        """As what is watched has it."""
        now = {"namespaces": self.namespaces, "secrets": self.applied[-1:], "pods": self.pods}
        now["slices"] = list(self.slices.values())
        return self.lagging.get(kind, now.get(kind, []))

    def delete(self, path: str) -> None:
        del self.slices[path.rpartition("/")[2]]

    def list(self, path: str, **query: str) -> Any:
        self.listed.append(path)
        return self.pods

    def find(self, path: str) -> dict[str, Any] | None:
        if path.endswith("/kube-system"):
            return {"metadata": {"uid": "0123456789"}}
        if path == "/api/v1/namespaces/team":
            return self.namespaces[0] if self.namespaces else None
        return self.applied[-1] if self.applied else None

    def apply(self, path: str, wanted: dict[str, Any]) -> None:
        if self.refuses:
            raise APIServerError("it is full")
        if wanted["kind"] == "Slice":
            self.slices[path.rpartition("/")[2]] = wanted
        elif wanted["kind"] == "Event":
            self.events.setdefault(path.rpartition("/")[2], []).append(wanted["message"])
        else:
            self.applied.append(wanted)


class Pool:
    def __init__(self) -> None:
        self.names: list[str] = []
        self.issued: list[dict[str, Any]] = []
        self.descriptions: dict[str, str] = {}
        self.is_down = False
        self.others: list[str] = []  # that appear before this one can be created
        self.held: dict[str, Lease] = {}
        self.released: list[str] = []

    def namespaces(self) -> list[dict[str, Any]]:
        if self.is_down:
            raise PoolUnreachable("no GPU pool answers")
        return [
            {"name": name, "limits": {"gpus": 1}, "description": self.descriptions.get(name, "")}
            for name in self.names
        ]

    def tokens(self) -> list[dict[str, Any]]:
        return self.issued

    def pool(self) -> dict[str, Any]:
        return {"servers": []}

    def create_namespace(self, name: str, fields: dict[str, Any]) -> None:
        if name in self.others:
            self.names.append(name)
            raise NamespaceConflict("it exists")
        self.names.append(name)
        self.descriptions[name] = fields["description"]

    def create_token(self, description: str, expires_s: float, **fields: Any) -> dict[str, Any]:
        token = {
            "id": str(len(self.issued)),
            "description": description,
            "state": "valid",
            "created_at": 1e12,
        }
        self.issued.append(token)
        return {**token, "files": {"client.yaml": "token: x"}}

    def leases(self, include_ended: bool = False) -> list[Lease]:
        return [lease for lease in self.held.values() if include_ended or not lease.state.ended]

    def lease(self, lease_id: str) -> Lease:
        if lease_id not in self.held:
            raise UnknownLease("there is none")
        return self.held[lease_id]

    def release(self, lease_id: str) -> None:
        self.released.append(lease_id)

    def revoke_token(self, token_id: str, end_leases: bool = False) -> None:
        self.issued[int(token_id)]["state"] = "revoked"


def controller(cluster: Cluster, pool: Pool, leads: Callable[[], bool] = lambda: True) -> Controller:
    return Controller(cast(APIServer, cluster), cast(PoolClient, pool), cluster, leads)


def test_a_round_does_what_is_to_be_done_and_the_next_one_nothing() -> None:
    cluster, pool = Cluster(), Pool()
    rounds = controller(cluster, pool)
    assert len(rounds.reconcile()) == 2
    (secret,) = cluster.applied
    assert secret["stringData"] == {"client.yaml": "token: x"}
    assert secret["metadata"]["annotations"][TOKEN_ID] == "0"
    assert rounds.reconcile() == []


def test_a_token_whose_secret_cannot_be_written_is_revoked_at_once() -> None:
    cluster, pool = Cluster(), Pool()
    cluster.refuses = True
    rounds = controller(cluster, pool)
    for _ in range(3):
        assert [type(action) for action in rounds.reconcile()][-1] is IssueToken
    assert [token["state"] for token in pool.issued] == ["revoked"] * 3
    cluster.refuses = False
    rounds.reconcile()
    assert rounds.reconcile() == []


def test_a_namespace_that_others_make_at_the_same_time_is_not_taken_over() -> None:
    cluster, pool = Cluster(), Pool()
    pool.others = ["team"]
    rounds = controller(cluster, pool)
    rounds.reconcile()
    assert pool.issued == [] and cluster.applied == []
    assert isinstance(rounds.reconcile()[0], Complain)
    rounds = Controller(cast(APIServer, cluster), cast(PoolClient, pool), cluster, adopted=["team"])
    rounds.reconcile()
    assert len(cluster.applied) == 1


def test_a_wrong_annotation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    rounds = controller(Cluster("gpus=many"), Pool())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert isinstance(rounds.reconcile()[0], Complain)
    assert [record.message for record in caplog.records if LIMITS in record.message] == [
        caplog.records[0].message
    ]


def test_a_pool_that_is_down_changes_nothing() -> None:
    cluster, pool = Cluster(), Pool()
    pool.is_down = True
    with pytest.raises(PoolError, match="no GPU pool answers"):
        controller(cluster, pool).reconcile()
    assert cluster.applied == []


def lease(state: LeaseState, **fields: Any) -> Lease:
    """Of the Pod with the uid 1, with a token of the cluster."""
    request = Request("1" * 8, "team@01234567", partial=0.8, namespace="team", client="host:1 pod:1")
    return Lease(request, state, created_at=time.time(), **fields)


def held(**fields: Any) -> Lease:
    pieces = (
        Slice("GPU-0", "gpu-1", 0, "V100", 26008, 32510),
        Slice("GPU-1", "gpu-1", 1, "V100", 26008, 32510),
    )
    return lease(LeaseState.ACTIVE, slices=pieces, granted_at=time.time(), **fields)


def with_pod() -> tuple[Cluster, Pool]:
    cluster, pool = Cluster(), Pool()
    cluster.pods = [{"metadata": {"name": "train", "namespace": "team", "uid": "1"}, "status": {}}]
    controller(cluster, pool).reconcile()
    return cluster, pool


def test_a_pod_is_told_how_its_lease_fares_each_thing_once() -> None:
    cluster, pool = with_pod()
    rounds = controller(cluster, pool)
    for one in (
        lease(LeaseState.QUEUED, position=3, waits_for="the limit of team"),
        lease(LeaseState.QUEUED, position=1),
        held(),
        replace(held(), state=LeaseState.LOST, reason="the worker has ended", ended_at=time.time()),
    ):
        pool.held = {one.id: one}
        for _ in range(3):
            rounds.reconcile()
    said = {name.rpartition(".")[2]: words for name, words in cluster.events.items()}
    assert said == {
        "queued": ["Queued at place 3: the limit of team", "Queued at place 1"],
        "granted": ["Granted GPUs 0 1 of gpu-1 with 26008 MiB each"],
        "ended": ["the worker has ended"],
    }


def test_a_pod_is_told_when_its_lease_is_parked_wakes_and_moves() -> None:
    cluster, pool = with_pod()
    rounds = controller(cluster, pool)
    active, now = held(), time.time()
    parked = replace(
        active, state=LeaseState.PARKED, slices=(), parked=Parked(26008, since=now - 60), position=None
    )
    woken = replace(parked, parked=Parked(26008, since=now - 60, wanted_since=now), position=2)
    elsewhere = (Slice("GPU-7", "gpu-2", 3, "V100", 26008, 32510),)
    for one in (
        active,
        parked,
        woken,
        replace(woken, position=1),
        replace(active, slices=elsewhere),  # wakes on another server
        active,  # and moves back
    ):
        pool.held = {one.id: one}
        for _ in range(2):
            rounds.reconcile()
    said = {name.rpartition(".")[2].partition("-")[0]: words for name, words in cluster.events.items()}
    assert said["parked"] == ["Parked while it was idle, for others waited"]
    assert said["waking"] == ["Waits for GPUs at place 2", "Waits for GPUs at place 1"]
    assert said["resumed"] == ["Has GPUs again: 3 of gpu-2"]
    assert said["moved"] == ["Moved from gpu-2 to 0 1 of gpu-1"]
    assert set(said) == {"granted", "parked", "waking", "resumed", "moved"}


def test_a_lease_that_came_and_went_unseen_is_told_of_once_its_pod_is_over() -> None:
    cluster, pool = with_pod()
    ended = replace(held(), state=LeaseState.RELEASED, ended_at=time.time())
    pool.held = {ended.id: ended}
    rounds = controller(cluster, pool)
    rounds.reconcile()
    assert cluster.events == {}
    cluster.pods[0]["status"] = {"phase": "Succeeded"}
    rounds.reconcile()
    assert sorted(name.rpartition(".")[2] for name in cluster.events) == ["ended", "granted"]


def test_a_slice_shows_each_lease_of_a_pod_and_the_last_one_that_ended() -> None:
    cluster, pool = with_pod()
    one = held()
    pool.held = {one.id: one}
    controller(cluster, pool).reconcile()
    (shown,) = cluster.slices.values()
    assert (shown["status"]["shown"], shown["status"]["gpus"]) == ("ACTIVE", "0 1 of gpu-1")
    assert shown["metadata"]["ownerReferences"][0]["uid"] == "1"
    pool.held[one.id] = replace(one, state=LeaseState.LOST, reason="it fell", ended_at=time.time())
    for _ in range(2):  # another controller each time, which has seen nothing
        controller(cluster, pool).reconcile()
        (shown,) = cluster.slices.values()
        assert (shown["status"]["state"], shown["status"]["label"]) == ("LOST", " (it fell)")
    following = replace(one, request=replace(one.request, id="2"))
    pool.held["2"] = following
    controller(cluster, pool).reconcile()
    assert list(cluster.slices) == ["2"]
    pool.held.clear()  # its ledger was lost
    controller(cluster, pool).reconcile()
    assert cluster.slices == {}


def test_a_lease_of_another_namespace_tells_the_pod_nothing() -> None:
    cluster, pool = with_pod()
    one = held()
    strangers = replace(one, request=replace(one.request, namespace="other", owner="other@01234567"))
    pool.names.append("other")
    pool.held = {one.id: strangers}
    controller(cluster, pool).reconcile()
    assert cluster.events == {} and pool.released == []


def test_a_lease_whose_pod_is_gone_is_released_unless_what_is_watched_lags_behind() -> None:
    cluster, pool = with_pod()
    one = held()
    pool.held = {one.id: one}
    cluster.lagging["pods"] = []
    controller(cluster, pool).reconcile()
    assert pool.released == []
    cluster.pods = []
    others = replace(one, request=replace(one.request, id="2", owner="ada"))  # perhaps of another cluster
    pool.held["2"] = others
    controller(cluster, pool).reconcile()
    assert pool.released == [one.id]


@pytest.mark.parametrize(
    ("owner", "prefix", "released"),
    [
        ("one:system:serviceaccount:blue:default", "one:", True),
        ("system:serviceaccount:blue:default", "", True),
        ("one:system:serviceaccount:blue:default", None, False),
        ("one:system:serviceaccount:blue:default", "", False),  # of another cluster
        ("one:system:serviceaccount:blue:default", "on", False),
        ("one:ada", "one:", False),
    ],
)
def test_the_lease_of_an_account_is_released_with_its_pod_if_it_is_of_this_cluster(
    owner: str, prefix: str | None, released: bool
) -> None:
    cluster, pool = with_pod()
    one = held()
    # The namespaces of the cluster and of the pool may differ, and neither needs to be labelled.
    one = replace(one, request=replace(one.request, owner=owner, namespace="shared"))
    pool.held = {one.id: one}
    rounds = Controller(cast(APIServer, cluster), cast(PoolClient, pool), cluster, user_prefix=prefix)
    rounds.reconcile()
    assert pool.released == []
    cluster.pods = []
    rounds.reconcile()
    assert pool.released == ([one.id] if released else [])


def test_the_lease_of_an_account_is_kept_while_its_pod_runs_unwatched_in_another_namespace() -> None:
    cluster, pool = with_pod()
    one = held()
    one = replace(
        one, request=replace(one.request, owner="system:serviceaccount:ci:default", namespace="shared")
    )
    pool.held = {one.id: one}
    cluster.lagging["pods"] = []  # it has no label
    rounds = Controller(cast(APIServer, cluster), cast(PoolClient, pool), cluster, user_prefix="")
    for _ in range(3):
        rounds.reconcile()
    assert pool.released == []
    assert cluster.listed.count("/api/v1/pods") == 1, "all Pods are not listed each time"


def test_a_secret_that_is_not_seen_yet_is_not_made_twice() -> None:
    cluster, pool = Cluster(), Pool()
    rounds = controller(cluster, pool)
    cluster.lagging["secrets"] = []
    for _ in range(3):
        rounds.reconcile()
    assert len(pool.issued) == 1 and len(cluster.applied) == 1


def test_a_namespace_that_is_not_seen_yet_keeps_its_leases() -> None:
    cluster, pool = Cluster(), Pool()
    rounds = controller(cluster, pool)
    rounds.reconcile()
    cluster.lagging["namespaces"] = []
    rounds.reconcile()
    assert pool.issued[0]["state"] == "valid"
    cluster.namespaces = []
    rounds.reconcile()
    assert pool.issued[0]["state"] == "revoked"


def test_one_that_does_not_lead_any_more_does_nothing() -> None:
    cluster, pool = Cluster(), Pool()
    answers = iter([True, False, False])
    assert len(controller(cluster, pool, lambda: next(answers)).reconcile()) == 2
    assert pool.names == ["team"] and pool.issued == []


def test_outside_a_pod_an_api_server_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(APIServerError, match="--api-server"):
        APIServer()
    with pytest.raises(APIServerError, match="cannot be used"):
        APIServer("https://127.0.0.1:1", ca_file="/nowhere")
