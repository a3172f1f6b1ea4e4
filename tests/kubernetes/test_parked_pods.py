"""A Pod's lease is parked for another Pod's and wakes again: what `kubectl` shows of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.kubernetes.names import GPU, INJECT, MANAGED, NEVER_PARK

from .cluster import Cluster, needs_api_server
from .pods import WAIT, pod
from .running_controller import RunningController

pytestmark = needs_api_server

RECLAIM = (
    "--PoolService.reclaim=idle",
    "--PoolService.reclaim_after_s=0",
    "--PoolService.min_resident_s=0",
    "--LocalEngine.park_memory_mib=64",
)
#: Has a tensor on a GPU, and goes on once it is told to.
PROGRAM = """
import pathlib, time, torch
kept = torch.arange(1000.0, device="cuda")
print("first", kept.sum().item(), flush=True)
while not pathlib.Path("/signals/on").exists():
    time.sleep(0.2)
print("then", (kept + 1).sum().item(), flush=True)
"""


@pytest.fixture(scope="module")
def reclaiming(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whose pool parks idle leases for requests that wait."""
    server = cluster.server
    server.stop()
    server.options = (*server.options, *RECLAIM)
    server.start()
    # One GPU is all that Pods can have, so that two of them fit the node but not the pool.
    words = ["run", "-n", "1", "--never-park", "--", "sleep", "infinity"]
    environment = {**os.environ, "GPUPOOL_CONFIG_DIR": str(server.folder / "admin")}
    program = subprocess.Popen([sys.executable, "-m", "jupyter_gpupool", *words], env=environment)
    try:
        yield cluster
    finally:
        program.terminate()
        program.wait(300)


def create(cluster: Cluster, asked: dict[str, Any], name: str) -> None:
    asked["metadata"]["name"] = name
    done = cluster.plane.kubectl("create", "-n", "naps", "-f", "-", given=[asked])
    assert done.returncode == 0, done.stderr


def told(cluster: Cluster, name: str) -> dict[str, str]:
    """What the Events on a Pod say, by reason."""
    events = cluster.plane.get("events", "-n", "naps")["items"]
    return {e["reason"]: e["message"] for e in events if e["involvedObject"].get("name") == name}


def test_a_pod_is_told_that_its_lease_is_parked_and_that_it_has_gpus_again(
    reclaiming: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    cluster, plane = reclaiming, reclaiming.plane
    eventually(
        lambda: [x.state for x in cluster.leases()] == [LeaseState.ACTIVE], "the other program's lease"
    )
    metadata = {"name": "naps", "labels": {MANAGED: "true"}}
    plane.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    plane.wait_for_namespace("naps")
    idle = pod({GPU: "1"}, labels={INJECT: "true"}, command=["python", "-c", PROGRAM])
    idle["spec"]["volumes"] = [{"name": "signals", "emptyDir": {}}]
    idle["spec"]["containers"][0]["volumeMounts"] = [{"name": "signals", "mountPath": "/signals"}]
    create(cluster, idle, "idle")
    eventually(lambda: "first 499500.0" in cluster.log("naps", "idle"), "that the program computes")

    needing = pod({GPU: "1"}, labels={INJECT: "true"}, annotations={NEVER_PARK: "true"}, command=WAIT)
    create(cluster, needing, "needing")
    eventually(lambda: "Granted" in told(cluster, "needing"), "the second Pod's GPUs")
    eventually(lambda: "Parked" in told(cluster, "idle"), "the Event about parking")
    assert told(cluster, "idle")["Parked"] == "Parked while it was idle, for others waited"

    def states() -> dict[str, str]:
        slices = plane.get("slices", "-n", "naps")["items"]
        return {one["spec"]["pod"]: one["status"]["state"] for one in slices}

    eventually(lambda: states() == {"idle": "PARKED", "needing": "ACTIVE"}, "both Slices")

    cluster.kubelet.write("naps", "idle", "signals", "on", "")
    eventually(lambda: "Waking" in told(cluster, "idle"), "the Event about its wish to go on")
    assert told(cluster, "idle")["Waking"].startswith("Waits for GPUs at place 1")
    plane.kubectl("delete", "pod", "needing", "-n", "naps")
    eventually(lambda: "Resumed" in told(cluster, "idle"), "the Event about its GPUs")
    assert told(cluster, "idle")["Resumed"].startswith("Has GPUs again: ")
    eventually(lambda: cluster.phase("naps", "idle") == "Succeeded", "the end of the program")
    assert "then 500500.0" in cluster.log("naps", "idle")
    eventually(lambda: "Released" in told(cluster, "idle"), "the last Event")
