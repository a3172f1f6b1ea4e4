"""What the controller plans: as values, against a cluster and a pool that do what it says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_gpupool.kubernetes.names import LIMITS, MANAGED, RENEW_AT, SLICE, TOKEN_ID
from jupyter_gpupool.kubernetes.plan import (
    GRACE_S,
    Action,
    ChangeLimits,
    Cluster,
    Complain,
    CreateNamespace,
    IssueToken,
    OfferSlices,
    Pool,
    PublishAddresses,
    RevokeToken,
    description,
    plan,
    plan_addresses,
)

from ..conftest import often
from .quantities import canonical

LIFE_S = 30_000.0
NAMES = ("a", "b", "c")


class World:
    """A cluster and a pool in which every action succeeds, or the Secret cannot be written."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.namespaces: dict[str, dict[str, Any]] = {}
        self.secrets: dict[str, dict[str, Any]] = {}
        self.quotas: dict[str, list[dict[str, Any]]] = {}
        self.nodes: list[dict[str, Any]] = [
            {"metadata": {"name": "node-1"}, "status": {"capacity": {"cpu": "4"}}}
        ]
        self.gpus = 8
        self.pool: dict[str, dict[str, Any]] = {"default": {}}
        self.descriptions: dict[str, str] = {}
        self.adopted: set[str] = set()
        self.tokens: list[dict[str, Any]] = []

    def add(self, name: str, **annotations: str) -> None:
        self.namespaces[name] = {"metadata": {"name": name, "annotations": annotations}}

    def remove(self, name: str) -> None:
        self.namespaces.pop(name, None)
        self.secrets.pop(name, None)

    def planned(self) -> list[Action]:
        for token in self.tokens:
            if token["state"] == "valid" and self.now >= token["expires_at"]:
                token["state"] = "expired"
        cluster = Cluster("id", list(self.namespaces.values()), self.secrets, self.quotas, self.nodes)
        pool = Pool(self.pool, self.tokens, self.gpus, self.descriptions)
        return plan(cluster, pool, self.now, self.adopted)

    def step(self, secrets_fail: bool = False, crash_after: int | None = None) -> list[Action]:
        actions = self.planned()
        for action in actions[:crash_after]:
            if isinstance(action, CreateNamespace):
                assert action.name not in self.pool
                self.pool[action.name] = dict(action.limits)
                self.descriptions[action.name] = action.description
            elif isinstance(action, ChangeLimits):
                self.pool[action.name].update(action.limits)
            elif isinstance(action, IssueToken):
                self._issue(action, secrets_fail)
            elif isinstance(action, RevokeToken):
                next(t for t in self.tokens if t["id"] == action.id)["state"] = "revoked"
            elif isinstance(action, OfferSlices):
                self.nodes[0]["status"]["capacity"][SLICE] = canonical(action.count)
        return actions

    def _issue(self, action: IssueToken, secrets_fail: bool) -> None:
        token = {
            "id": str(len(self.tokens)),
            "description": action.description,
            "owner": action.owner,
            "state": "valid",
            "created_at": self.now,
            "expires_at": self.now + LIFE_S,
        }
        self.tokens.append(token)
        if not secrets_fail:
            annotations = {TOKEN_ID: token["id"], RENEW_AT: str(self.now + LIFE_S * 2 / 3)}
            self.secrets[action.namespace] = {"metadata": {"annotations": annotations}}

    def valid(self, name: str) -> list[dict[str, Any]]:
        text = description("id", name)
        return [t for t in self.tokens if t["description"] == text and t["state"] == "valid"]


def test_a_labelled_namespace_gets_its_counterpart_a_token_and_slices() -> None:
    world = World()
    world.add("a", **{LIMITS: "gpus=4, leases=10"})
    kinds = [type(action) for action in world.step()]
    assert kinds == [CreateNamespace, IssueToken, OfferSlices]
    assert world.pool["a"] == {"gpus": 4.0, "leases": 10}
    assert world.nodes[0]["status"]["capacity"][SLICE] == "800"
    assert world.step() == []


@pytest.mark.parametrize("gpus", [1, 10, 25, 10_000])
def test_nodes_that_offer_the_slices_are_left_alone_however_the_number_is_written(gpus: int) -> None:
    world = World()
    world.gpus = gpus
    assert world.step() == [OfferSlices("node-1", gpus * 100)]
    assert world.step() == []
    for other in ("7", "1500m", "many"):
        world.nodes[0]["status"]["capacity"][SLICE] = other
        assert len(world.step()) == 1


def test_a_quota_gives_the_limit_where_no_annotation_does() -> None:
    world = World()
    world.add("a")
    world.quotas["a"] = [{"spec": {"hard": {f"requests.{SLICE}": n}}} for n in ("400", "150")]
    world.step()
    assert world.pool["a"] == {"gpus": 1.5}
    world.quotas["a"] = []
    assert world.step() == []  # what an administrator of the pool sets there then stays


def test_a_token_is_replaced_after_two_thirds_and_its_predecessor_is_revoked_later() -> None:
    world = World()
    world.add("a")
    world.step()
    world.now += LIFE_S * 0.67
    assert [type(action) for action in world.step()] == [IssueToken]
    assert len(world.valid("a")) == 2
    assert len({token["owner"] for token in world.tokens}) == 1
    assert world.step() == []
    world.now += GRACE_S
    assert world.step() == [RevokeToken("0", False)]
    assert [token["id"] for token in world.valid("a")] == ["1"]


def test_a_namespace_that_is_gone_loses_its_tokens_and_leases_alone() -> None:
    world = World()
    for name in ("a", "ab"):
        world.add(name)
    world.step()
    world.remove("a")
    assert world.step() == [RevokeToken("0", True, "a")]
    assert len(world.valid("ab")) == 1
    assert "a" in world.pool


def test_a_namespace_that_is_being_deleted_gets_nothing_new() -> None:
    world = World()
    world.add("a")
    world.namespaces["a"]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert [type(action) for action in world.step()] == [OfferSlices]


def test_a_secret_made_by_hand_stays() -> None:
    world = World()
    world.add("a")
    world.secrets["a"] = {"metadata": {"name": "gpupool"}}
    assert not any(isinstance(action, IssueToken) for action in world.step())


@pytest.mark.parametrize("text", ["gpus", "gpus=many", "gpus=0", "gpus=nan", "leases=1.5", "colour=3"])
def test_wrong_limits_are_complained_about_and_block_nothing_else(text: str) -> None:
    world = World()
    world.add("a", **{LIMITS: text})
    complaint, *others = world.step()
    assert isinstance(complaint, Complain)
    assert LIMITS in complaint.message
    assert [type(action) for action in others] == [CreateNamespace, IssueToken, OfferSlices]


def test_a_namespace_of_the_pool_that_others_made_is_left_alone() -> None:
    world = World()
    world.pool["team"] = {"gpus": 8.0}
    for name in ("default", "team"):
        world.add(name, **{LIMITS: "gpus=1"})
    for _ in range(2):
        complaints = [action for action in world.step() if not isinstance(action, OfferSlices)]
        assert [(type(one), one.namespace) for one in complaints] == [  # type: ignore[union-attr]
            (Complain, "default"),
            (Complain, "team"),
        ]
    assert "--adopt team" in str(complaints[1])
    assert world.pool == {"default": {}, "team": {"gpus": 8.0}} and world.tokens == []
    world.adopted = {"team"}
    kinds = [type(action) for action in world.step()]
    assert kinds == [Complain, ChangeLimits, IssueToken]


def test_a_namespace_that_this_cluster_made_is_known_by_its_description_or_by_a_token() -> None:
    world = World()
    world.add("a")
    world.step(crash_after=1)
    assert "a" in world.pool and world.tokens == []
    assert IssueToken in [type(action) for action in world.step()]
    world.descriptions.clear()  # somebody writes another one
    world.tokens[0]["state"] = "revoked"
    assert IssueToken in [type(action) for action in world.step()]
    world.descriptions["a"] = description("other", "a")
    world.tokens.clear()
    assert [type(action) for action in world.step()] == [Complain]


def test_the_pools_addresses_are_published_but_not_over_what_somebody_wrote() -> None:
    def config_map(name: str, data: dict[str, str], **labels: str) -> dict[str, Any]:
        return {"metadata": {"name": "gpupool", "namespace": name, "labels": labels}, "data": data}

    present = [
        config_map("by-hand", {"own": "x"}),
        config_map("good", {"ca.crt": "A"}, **{MANAGED: "true"}),
        config_map("old", {"ca.crt": "B"}, **{MANAGED: "true"}),
        config_map("strangers", {}),
    ]
    own = {"by-hand", "good", "old", "new"}
    assert plan_addresses(own, present, {"ca.crt": "A"}) == [PublishAddresses("new"), PublishAddresses("old")]


EVENTS = st.one_of(
    st.tuples(st.sampled_from(["add", "remove", "lose secret"]), st.sampled_from(NAMES)),
    st.tuples(st.just("pass"), st.sampled_from([1.0, GRACE_S, LIFE_S / 3, LIFE_S])),
    st.tuples(st.sampled_from(["step", "failing step"]), st.just("")),
    st.tuples(st.just("crash"), st.integers(0, 4)),
)


@pytest.mark.soak
@settings(max_examples=often(200, 5000), deadline=None)
@given(st.lists(EVENTS, max_size=20))
def test_after_any_history_everything_is_as_it_should_be(events: list[tuple[str, Any]]) -> None:
    world = World()
    for what, of in events:
        if what == "add":
            world.add(of)
        elif what == "remove":
            world.remove(of)
        elif what == "lose secret":
            world.secrets.pop(of, None)
        elif what == "pass":
            world.now += of
        elif what == "crash":
            world.step(crash_after=of)
        else:
            world.step(secrets_fail=what == "failing step")
    world.step()
    world.now += GRACE_S
    world.step()
    assert world.planned() == []
    for name in NAMES:
        valid = world.valid(name)
        assert len(valid) == (name in world.namespaces)
        if valid:
            assert world.secrets[name]["metadata"]["annotations"][TOKEN_ID] == valid[0]["id"]
