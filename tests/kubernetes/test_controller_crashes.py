"""The controller is killed again and again while Pods come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.kubernetes.names import GPU, INJECT, MANAGED, SHARE_PERCENT

from ..conftest import often
from .cluster import Cluster, needs_api_server
from .pods import pod
from .running_controller import RunningController

pytestmark = needs_api_server

KILLS, PODS_BETWEEN = often(4, 50), often(3, 4)
NAMESPACES = ("storm", "calm")


@pytest.mark.soak
def test_whenever_it_is_killed_the_objects_end_true_to_the_pool(
    cluster: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    plane = cluster.plane
    for name in NAMESPACES:
        metadata = {"name": name, "labels": {MANAGED: "true"}}
        plane.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        plane.wait_for_namespace(name)
    names: list[str] = []
    killed = ""
    for kill in range(KILLS):
        # One that does not lead yet does nothing that a kill could interrupt.
        eventually(lambda last=killed: controller.holder() not in ("", last), "a leader that lives")
        batch = []
        for number in range(PODS_BETWEEN):
            asked = pod({GPU: "1", SHARE_PERCENT: "30"}, labels={INJECT: "true"}, command=["true"])
            asked["metadata"]["name"] = f"pod-{kill}-{number}"
            batch.append(asked)
            done = plane.kubectl("create", "-n", "storm", "-f", "-", given=[asked])
            assert done.returncode == 0, done.stderr
        names += [one["metadata"]["name"] for one in batch]
        first = batch[0]["metadata"]["name"]
        # At another point of a Pod's life each time.
        waited = ("Pending", "Running", "Succeeded")[kill % 3 :]
        eventually(lambda one=first, of=waited: cluster.phase("storm", one) in of, f"{waited[0]} of {first}")
        killed = controller.holder()
        controller.kill()
        controller.start()

    def phases() -> Counter[str]:
        return Counter(one["status"].get("phase") for one in plane.get("pods", "-n", "storm")["items"])

    eventually(lambda: phases() == {"Succeeded": len(names)}, "the end of all Pods")

    def shown() -> list[tuple[str, str]]:
        slices = plane.get("slices", "-n", "storm")["items"]
        return sorted((one["spec"]["pod"], one["status"]["state"]) for one in slices)

    eventually(lambda: shown() == sorted((name, "RELEASED") for name in names), "a Slice of each Pod")
    assert cluster.leases() == []
    eventually(lambda: valid(cluster) == dict.fromkeys(NAMESPACES, 1), "one valid token of each namespace")
    events = plane.get("events", "-n", "storm")["items"]
    told = Counter(
        (e["involvedObject"]["name"], e["reason"]) for e in events if e["reason"] in ("Granted", "Released")
    )
    assert told == {(name, reason): 1 for name in names for reason in ("Granted", "Released")}
    plane.kubectl("delete", "pods", "--all", "-n", "storm")
    eventually(lambda: not shown(), "the end of the Slices with their Pods")
    assert plane.kubectl("delete", "namespace", "storm").returncode == 0


def valid(cluster: Cluster) -> Counter[str]:
    """How many valid tokens each of the namespaces has."""
    tokens = cluster.administrator.tokens()
    return Counter(t["namespace"] for t in tokens if t["state"] == "valid" and t["namespace"] in NAMESPACES)
