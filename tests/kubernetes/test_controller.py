"""`gpupool kubernetes controller` on a real API server, with the rights of its manifests and no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.kubernetes.controller_manifests import NAME
from jupyter_gpupool.kubernetes.names import (
    CONFIG_MAP,
    DEFAULT_SECRET,
    GPU,
    INJECT,
    LIMITS,
    MANAGED,
    SHARE_PERCENT,
    SLICE,
    TOKEN_ID,
)
from jupyter_gpupool.kubernetes.pod_leases import pod_uid

from ..server.daemon.conftest import gpupool
from .cluster import Cluster, needs_api_server
from .pods import STUBBORN, WAIT, pod
from .running_controller import SYSTEM, RunningController

pytestmark = needs_api_server

COLUMNS = ["NAME", "STATE", "GPUS", "MIB", "PYTORCH", "SINCE", "ENDS", "OWNER", "LABEL", "POD"]


def config_map(cluster: Cluster, namespace: str) -> dict[str, Any] | None:
    found = cluster.plane.kubectl("get", "configmap", CONFIG_MAP, "-n", namespace)
    return cluster.plane.get("configmap", CONFIG_MAP, "-n", namespace) if found.returncode == 0 else None


def secret(cluster: Cluster, namespace: str) -> dict[str, Any] | None:
    found = cluster.plane.kubectl("get", "secret", DEFAULT_SECRET, "-n", namespace)
    return cluster.plane.get("secret", DEFAULT_SECRET, "-n", namespace) if found.returncode == 0 else None


def tokens(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    return [
        t for t in cluster.administrator.tokens() if t["namespace"] == namespace and t["state"] == "valid"
    ]


def test_a_labelled_namespace_is_all_that_a_pod_needs(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    metadata = {"name": "team", "labels": {MANAGED: "true"}, "annotations": {LIMITS: "gpus=1.5"}}
    cluster.plane.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    cluster.plane.wait_for_namespace("team")
    made = eventually(lambda: secret(cluster, "team"), "the Secret")
    (token,) = tokens(cluster, "team")
    assert made["metadata"]["annotations"][TOKEN_ID] == token["id"]
    assert (token["scope"], token["one_namespace"], token["administers"]) == ("lease", True, False)
    (namespace,) = [n for n in cluster.administrator.namespaces() if n["name"] == "team"]
    assert namespace["limits"]["gpus"] == 1.5
    addresses = eventually(lambda: config_map(cluster, "team"), "the pool's addresses")["data"]
    assert addresses["ca.crt"] == cluster.server.ca and str(cluster.server.port) in addresses["servers.conf"]
    assert token["id"] not in str(addresses)

    def offered() -> str:
        return str(cluster.plane.get("node", "node-1")["status"]["capacity"][SLICE])

    gpus = sum(len(server["gpus"]) for server in cluster.administrator.pool()["servers"])
    eventually(lambda: offered() == str(100 * gpus), "the node's slices")
    asked = pod({GPU: "1", SHARE_PERCENT: "50"}, labels={INJECT: "true"}, command=["true"])
    assert cluster.plane.kubectl("create", "-n", "team", "-f", "-", given=[asked]).returncode == 0
    eventually(lambda: cluster.phase("team", "train") in ("Succeeded", "Failed"), "the end of the Pod")
    assert cluster.phase("team", "train") == "Succeeded", cluster.log("team", "train")


def told(cluster: Cluster, namespace: str, name: str) -> dict[str, str]:
    """What the Events on a Pod say, by reason."""
    uid = cluster.plane.get("pod", name, "-n", namespace)["metadata"]["uid"]
    events = cluster.plane.get("events", "-n", namespace)["items"]
    return {e["reason"]: e["message"] for e in events if e["involvedObject"].get("uid") == uid}


def slices_of_pods(cluster: Cluster, *pods: str) -> list[str]:
    found = cluster.plane.get("slices", "-n", "team")["items"]
    return [one["metadata"]["name"] for one in found if one["spec"]["pod"] in pods]


def has_event(cluster: Cluster, name: str, reason: str) -> bool:
    return reason in told(cluster, "team", name)


def shows_what_the_pool_says(cluster: Cluster, eventually: Callable[..., Any]) -> None:
    """`kubectl get slices` beside `gpupool leases`, column by column."""
    said = gpupool("leases", GPUPOOL_CONFIG_DIR=str(cluster.server.folder / "admin")).stdout.splitlines()
    rows = {row[0]: row for row in (re.split(r" {2,}", line.strip()) for line in said[1:])}
    assert len(rows) == 2
    names = {
        pod["metadata"]["uid"]: pod["metadata"]["name"]
        for pod in cluster.plane.get("pods", "-n", "team")["items"]
    }
    pods = {lease.id: names[pod_uid(lease)] for lease in cluster.leases()}

    def shown() -> bool:
        """Whether all live ones are there, with all words of the pool's but those for times."""
        lines = cluster.plane.kubectl("get", "slices", "-n", "team").stdout.splitlines()
        assert not lines or lines[0].split() == COLUMNS
        found = {line.split()[0]: line for line in lines[1:]}
        return all(
            lease in found
            and pods[lease] in found[lease].split()
            and all(row[n] in found[lease] for n in (1, 2, 3, 4, 7, 8))
            for lease, row in rows.items()
        )

    eventually(shown, "the Slices")
    servers = cluster.plane.kubectl("get", "gpuservers").stdout.splitlines()
    assert servers[0].split() == ["NAME", "STATE", "GPUS", "MODEL", "MIB", "GRANTED", "HOST"]
    assert "Ready" in servers[1] and "(emulated)" in servers[1]


def test_a_pod_is_told_how_its_lease_fares(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    eventually(lambda: "Released" in told(cluster, "team", "train"), "its Events")
    events = told(cluster, "team", "train")
    assert events["Granted"].startswith("Granted GPUs 0 of ")
    assert events["Granted"].endswith("with 16255 MiB each")
    for name, awaited in (("first", "Granted"), ("second", "Queued")):
        asked = pod({GPU: "1", SHARE_PERCENT: "100"}, labels={INJECT: "true"}, command=WAIT)
        asked["metadata"]["name"] = name
        cluster.plane.kubectl("create", "-n", "team", "-f", "-", given=[asked])
        eventually(partial(has_event, cluster, name, awaited), f"{awaited} on {name}")
    assert told(cluster, "team", "second")["Queued"].startswith("Queued at place 1: ")
    shows_what_the_pool_says(cluster, eventually)
    cluster.plane.kubectl("delete", "pod", "first", "-n", "team")
    eventually(lambda: "Granted" in told(cluster, "team", "second"), "the second Pod's turn")
    cluster.plane.kubectl("delete", "pod", "second", "-n", "team")
    eventually(
        lambda: not slices_of_pods(cluster, "first", "second"), "the end of the Slices with their Pods"
    )


def test_a_lease_whose_pod_is_gone_is_released_although_its_program_runs(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    """As on a node that the control plane has lost: the Pod is deleted there, and its processes go on."""
    asked = pod({GPU: "1"}, labels={INJECT: "true"}, command=STUBBORN)
    asked["metadata"]["name"] = "lost"
    cluster.plane.kubectl("create", "-n", "team", "-f", "-", given=[asked])
    held = eventually(
        lambda: [
            x for x in cluster.leases() if x.state is LeaseState.ACTIVE and x.request.namespace == "team"
        ],
        "the lease",
    )
    cluster.kubelet.forget("team", "lost")
    cluster.plane.kubectl("delete", "pod", "lost", "-n", "team", "--force", "--grace-period=0")
    eventually(lambda: not cluster.leases(), "the end of the lease")
    assert cluster.administrator.lease(held[0].id).state is LeaseState.RELEASED


def test_another_controller_takes_over(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    first = controller.holder()
    controller.start()
    assert controller.stop() == 0
    eventually(lambda: controller.holder() not in ("", first), "another leader")
    cluster.plane.kubectl("delete", "secret", DEFAULT_SECRET, "-n", "team")
    eventually(lambda: secret(cluster, "team"), "the Secret, of the other one")


def test_a_limit_that_is_changed_reaches_the_pool(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    cluster.plane.kubectl("annotate", "--overwrite", "namespace", "team", f"{LIMITS}=gpus=1,leases=3")

    def limits() -> dict[str, Any]:
        return next(n["limits"] for n in cluster.administrator.namespaces() if n["name"] == "team")

    eventually(lambda: (limits()["gpus"], limits()["leases"]) == (1, 3), "the new limits")


def test_a_secret_that_was_deleted_is_made_again(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    before = secret(cluster, "team")
    assert before is not None
    cluster.plane.kubectl("delete", "secret", DEFAULT_SECRET, "-n", "team")
    after = eventually(lambda: secret(cluster, "team"), "the Secret")
    assert after["metadata"]["annotations"][TOKEN_ID] != before["metadata"]["annotations"][TOKEN_ID]


def test_it_may_see_no_other_secret(cluster: Cluster, controller: RunningController) -> None:
    account = f"--as=system:serviceaccount:{SYSTEM}:{NAME}"
    for words, answer in (
        (("get", f"secrets/{DEFAULT_SECRET}"), "yes"),
        (("get", "secrets/other"), "no"),
        (("list", "secrets"), "no"),
        (("watch", "secrets"), "no"),
        (("get", "pods"), "no"),
        (("delete", "pods"), "no"),
        (("create", "pods"), "no"),
        (("patch", "nodes"), "no"),
    ):
        done = cluster.plane.kubectl("auth", "can-i", *words, account, "-n", "team")
        assert done.stdout.strip() == answer, words


def test_a_namespace_that_goes_while_no_controller_runs_hangs_nowhere(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    assert tokens(cluster, "team")
    controller.kill()
    done = cluster.plane.kubectl("delete", "namespace", "team")  # waits until it is gone
    assert done.returncode == 0, done.stderr
    assert tokens(cluster, "team")
    controller.start()
    eventually(lambda: not tokens(cluster, "team"), "the end of the namespace's tokens")
    assert controller.stop() == 0
    assert '"level": "error"' not in controller.log, controller.log
