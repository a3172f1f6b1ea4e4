"""Tokens that are rotated, revoked or expire while Pods run with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.kubernetes.names import (
    DEFAULT_SECRET,
    GPU,
    INJECT,
    MANAGED,
    RENEW_AT,
    SHARE_PERCENT,
    TOKEN_ID,
    VOLUME,
)

from .cluster import Cluster, needs_api_server
from .pods import ASKS, WAIT, pod
from .running_controller import RunningController

pytestmark = needs_api_server


def create(cluster: Cluster, namespace: str, name: str, command: list[str]) -> None:
    asked = pod({GPU: "1", SHARE_PERCENT: "30"}, labels={INJECT: "true"}, command=command)
    asked["metadata"]["name"] = name
    done = cluster.plane.kubectl("create", "-n", namespace, "-f", "-", given=[asked])
    assert done.returncode == 0, done.stderr


def active(cluster: Cluster, namespace: str) -> list[Lease]:
    leases = cluster.leases()
    return [x for x in leases if x.state is LeaseState.ACTIVE and x.request.namespace == namespace]


def runs(cluster: Cluster, namespace: str, name: str) -> list[Lease]:
    """The namespace's lease, once the Pod's program has started with it."""
    return active(cluster, namespace) if "Running client command" in cluster.log(namespace, name) else []


def said(cluster: Cluster, words: str) -> int:
    """How often the Pod that asks again and again has said so."""
    return cluster.log("rotated", "train").splitlines().count(words)


def valid(cluster: Cluster, namespace: str) -> list[str]:
    """The ids of the namespace's tokens that are valid."""
    tokens = cluster.administrator.tokens()
    return [t["id"] for t in tokens if t["namespace"] == namespace and t["state"] == "valid"]


def test_a_running_pod_goes_on_with_the_token_that_replaces_its_own(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    plane = cluster.plane
    metadata = {"name": "rotated", "labels": {MANAGED: "true"}}
    plane.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    plane.wait_for_namespace("rotated")
    secret = ("secret", DEFAULT_SECRET, "-n", "rotated")
    eventually(lambda: plane.kubectl("get", *secret).returncode == 0, "the Secret")
    (former,) = valid(cluster, "rotated")
    create(cluster, "rotated", "train", ["sh", "-c", ASKS])
    (lease,) = eventually(lambda: runs(cluster, "rotated", "train"), "the lease")
    eventually(lambda: said(cluster, "answered"), "that the pool answers the Pod")

    plane.kubectl("annotate", "--overwrite", *secret, f"{RENEW_AT}=0")

    def replaced() -> str:
        """The Secret's token, if it is another one."""
        found = str(plane.get(*secret)["metadata"]["annotations"][TOKEN_ID])
        return "" if found == former else found

    token = eventually(replaced, "another token")
    eventually(
        lambda: token in cluster.kubelet.mounted("rotated", "train", VOLUME, "client.yaml"),
        "the new bundle in the Pod",
    )
    cluster.administrator.revoke_token(former)  # as the controller does ten minutes later
    assert valid(cluster, "rotated") == [token]
    answered = said(cluster, "answered")
    # One call may have been under way.
    eventually(lambda: said(cluster, "answered") > answered + 1, "further answers")
    assert said(cluster, "refused") == 0, cluster.log("rotated", "train")
    assert [one.id for one in active(cluster, "rotated")] == [lease.id]
    plane.kubectl("delete", "pod", "train", "-n", "rotated")
    assert cluster.administrator.lease(lease.id).state is LeaseState.RELEASED


@pytest.mark.parametrize(
    ("how", "words"), [("revoked", "Token revoked at: "), ("expired", "Token expired at: ")]
)
def test_a_running_pod_keeps_what_it_holds_and_the_next_one_is_refused(
    cluster: Cluster, eventually: Callable[..., Any], how: str, words: str
) -> None:
    cluster.open_namespace(how)
    (token,) = valid(cluster, how)
    create(cluster, how, "first", WAIT)
    (lease,) = eventually(lambda: runs(cluster, how, "first"), "the lease")
    if how == "revoked":
        cluster.administrator.revoke_token(token)
    else:
        cluster.administrator.extend_token(token, 1.0)
        eventually(lambda: not valid(cluster, how), "the end of the token's life")
    create(cluster, how, "second", ["true"])
    eventually(lambda: cluster.phase(how, "second") == "Failed", "the second Pod's end")
    assert words in cluster.log(how, "second")
    assert [one.id for one in active(cluster, how)] == [lease.id]
    cluster.plane.kubectl("delete", "pod", "first", "-n", how)
    assert cluster.administrator.lease(lease.id).state is LeaseState.RELEASED


def test_a_token_that_is_revoked_with_its_leases_ends_that_of_a_running_pod(
    cluster: Cluster, eventually: Callable[..., Any]
) -> None:
    cluster.open_namespace("cut")
    (token,) = valid(cluster, "cut")
    create(cluster, "cut", "train", WAIT)
    eventually(lambda: runs(cluster, "cut", "train"), "the lease")
    cluster.administrator.revoke_token(token, end_leases=True)
    assert active(cluster, "cut") == []
    eventually(
        lambda: "has ended while the command runs" in cluster.log("cut", "train"), "that the Pod is told"
    )
    cluster.plane.kubectl("delete", "pod", "train", "-n", "cut")
