"""Pods on a real API server, by kubectl: admitted, given slices of a real pool, run, and refused."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.client.requests import new_request
from jupyter_gpupool.core.errors import PermissionDenied, UnknownLease
from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.kubernetes.manifests import manifests
from jupyter_gpupool.kubernetes.names import CLIENT, GPU, INJECT, SHARE_PERCENT, SLICE

from .cluster import Cluster, needs_api_server, options
from .pods import WAIT, figure_12, missing_line, pod
from .quantities import canonical

pytestmark = needs_api_server


def test_the_api_server_takes_the_manifests(cluster: Cluster) -> None:
    namespace, *others = manifests(options(cluster.webhook))
    cluster.plane.create(namespace)
    cluster.plane.wait_for_namespace(namespace["metadata"]["name"])
    done = cluster.plane.kubectl("apply", "--dry-run=server", "-f", "-", given=others)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(server dry run)") == len(others)


def test_the_pod_of_the_case_study_trains_on_its_slices(
    cluster: Cluster, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    cluster.open_namespace("cnasg")
    plane = cluster.plane
    capacity = {"storage": "10Gi"}
    volume = {
        "capacity": capacity,
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "bf-k8s",
        "hostPath": {"path": str(tmp_path)},
    }
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": capacity},
        "storageClassName": "bf-k8s",
    }
    name = "pod-pytorch-mock-bitfusion"
    plane.create({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "pv"}, "spec": volume})
    metadata = {"name": "pvc-pytorch-mock-bitfusion", "namespace": "cnasg"}
    claimed = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claim}
    done = plane.kubectl("apply", "-n", "cnasg", "-f", "-", given=[figure_12(), claimed])
    assert done.returncode == 0, done.stderr

    def lease_of_pod() -> Any:
        uid = plane.get("pod", name, "-n", "cnasg")["metadata"]["uid"]
        held = [lease for lease in cluster.leases() if f" pod:{uid}" in lease.request.client]
        return held[0] if held and held[0].state is LeaseState.ACTIVE else None

    lease = eventually(lease_of_pod, "the Pod's lease")
    assert [piece.memory_mib for piece in lease.slices] == [26008, 26008]
    assert lease.request.namespace == "cnasg"
    eventually(lambda: cluster.phase("cnasg", name) in ("Succeeded", "Failed"), "the end of the Pod")
    log = cluster.log("cnasg", name)
    assert cluster.phase("cnasg", name) == "Succeeded", log
    assert missing_line(log) == "", log
    assert (tmp_path / "mnist_cnn.pt").stat().st_size > 0
    assert cluster.leases() == []


def test_a_quota_of_100_lets_one_pod_of_80_in(cluster: Cluster, eventually: Callable[..., Any]) -> None:
    plane = cluster.plane
    plane.new_namespace("quota")
    metadata = {"name": "gpus", "namespace": "quota"}
    spec = {"hard": {f"requests.{SLICE}": "100"}}
    plane.create({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": spec})

    def create(name: str) -> Any:
        asked = pod({GPU: "1", SHARE_PERCENT: "80"}, labels={INJECT: "true"}, command=WAIT)
        asked["metadata"]["name"] = name
        return plane.kubectl("create", "-n", "quota", "-f", "-", given=[asked])

    first = create("first")
    assert first.returncode == 0, first.stderr
    second = create("second")
    assert second.returncode == 1
    assert f"exceeded quota: gpus, requested: requests.{SLICE}=80, used: requests.{SLICE}=80" in second.stderr
    plane.kubectl("delete", "pod", "first", "-n", "quota", "--now")
    # The quota is counted again some time after the Pod has gone.
    eventually(lambda: create("second").returncode == 0, "room in the quota")


def test_the_pods_of_a_job_wait_for_the_quota_and_then_run(
    cluster: Cluster, eventually: Callable[..., Any]
) -> None:
    plane = cluster.plane
    cluster.open_namespace("jobs")
    metadata = {"name": "gpus", "namespace": "jobs"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata}
    plane.create({**quota, "spec": {"hard": {f"requests.{SLICE}": "100"}}})
    made = pod({GPU: "1", SHARE_PERCENT: "80"}, labels={INJECT: "true"}, command=["true"])
    template = {
        "metadata": {"labels": made["metadata"]["labels"]},
        "spec": {**made["spec"], "restartPolicy": "Never"},
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train", "namespace": "jobs"}}
    plane.create({**job, "spec": {"completions": 2, "parallelism": 2, "template": template}})
    eventually(lambda: plane.get("job", "train", "-n", "jobs")["status"].get("succeeded") == 2, "the Job")
    said = [e["message"] for e in plane.get("events", "-n", "jobs")["items"] if e["reason"] == "FailedCreate"]
    assert said and all("exceeded quota: gpus" in message for message in said)


def test_users_of_two_namespaces_neither_see_nor_use_each_others(cluster: Cluster) -> None:
    clients = []
    for name in ("ours", "theirs"):
        cluster.open_namespace(name)
        data = cluster.plane.get("secret", "gpupool", "-n", name)["data"]
        text = base64.b64decode(data["client.yaml"]).decode()
        clients.append(cluster.server.client(text.partition("token: ")[2].strip()))
    ours, theirs = clients
    request, _ = new_request(partial=0.1)
    lease = ours.request(request, wait_s=10)
    try:
        assert lease.id in [one.id for one in ours.leases()]
        assert theirs.leases() == []
        with pytest.raises(UnknownLease):
            theirs.release(lease.id)
        with pytest.raises(PermissionDenied, match="namespace 'theirs', not 'ours'"):
            theirs.request(replace(new_request(partial=0.1)[0], namespace="ours"))
    finally:
        ours.release(lease.id)


def test_quantities_reach_policies_as_other_tests_rewrite_them(cluster: Cluster) -> None:
    """What `.quantities` does, which stands in for an API server where policies are evaluated without one."""
    texts = (
        "8000 8k 100000 1000000 4096 0 0k 100 1k 1e3 1e2 20E2 2000m 1500m 0.5 1.5 1.500 8.000 .25 .255 +5 08"
    )
    texts += " 1Ki 8Ki 1000Ki 1024Ki 1.5Gi 0.5Ki 99999999999999999 1M 1000M"
    written = [16000, *texts.split()]
    asked = pod()
    asked["spec"]["containers"] = [
        {"name": f"c{n}", "image": "c:1", "resources": {"limits": {"memory": one}}}
        for n, one in enumerate(written)
    ]
    # Not as YAML, of which kubectl reads more texts as numbers than Python writes.
    done = cluster.plane.kubectl(
        "create", "--dry-run=server", "-o", "json", "-f", "-", given=json.dumps(asked)
    )
    assert done.returncode == 0, done.stderr
    found = [c["resources"]["limits"]["memory"] for c in json.loads(done.stdout)["spec"]["containers"]]
    assert dict(zip(written, found)) == {one: canonical(one) for one in written}


def test_a_refusal_reaches_the_author(cluster: Cluster) -> None:
    wrong = figure_12()
    wrong["spec"]["containers"][0]["env"][3]["value"] = "80"
    done = cluster.plane.kubectl("create", "-f", "-", given=[wrong])
    assert done.returncode == 1
    assert "PARTIAL_GPU must be a number above 0 and at most 1, not '80'" in done.stderr


def test_a_pod_whose_image_lacks_the_client_gets_it_by_an_init_container(
    cluster: Cluster, eventually: Callable[..., Any]
) -> None:
    cluster.open_namespace("bare")
    program = [
        "python3",
        "-c",
        "import jupyter_gpupool, os; print(jupyter_gpupool.__file__, os.listdir('/opt'))",
    ]
    asked = pod(
        {GPU: "1", SHARE_PERCENT: "50"},
        labels={INJECT: "true"},
        annotations={CLIENT: "copy"},
        command=program,
    )
    asked["spec"]["containers"][0]["image"] = "bare:1"
    done = cluster.plane.kubectl("create", "-n", "bare", "-f", "-", given=[asked])
    assert done.returncode == 0, done.stderr
    eventually(lambda: cluster.phase("bare", "train") in ("Succeeded", "Failed"), "the end of the Pod")
    log = cluster.log("bare", "train")
    assert cluster.phase("bare", "train") == "Succeeded", log
    assert "Locked 1 GPUs with partial memory 0.5" in log
    assert "/opt/gpupool/lib/jupyter_gpupool/__init__.py ['gpupool']" in log
    assert cluster.leases() == []


def test_a_deleted_pod_gives_its_slices_back(cluster: Cluster, eventually: Callable[..., Any]) -> None:
    cluster.open_namespace("deleted")
    asked = pod({GPU: "1", SHARE_PERCENT: "50"}, labels={INJECT: "true"}, command=WAIT)
    assert cluster.plane.kubectl("create", "-n", "deleted", "-f", "-", given=[asked]).returncode == 0
    eventually(lambda: [lease for lease in cluster.leases() if lease.state is LeaseState.ACTIVE], "the lease")
    done = cluster.plane.kubectl("delete", "pod", "train", "-n", "deleted")
    assert done.returncode == 0, done.stderr
    assert cluster.leases() == []


@pytest.mark.parametrize("how", ["evicted", "killed"])
def test_a_pod_that_ends_by_force_leaves_nothing(
    cluster: Cluster, eventually: Callable[..., Any], how: str
) -> None:
    cluster.open_namespace(how)
    asked = pod({GPU: "1", SHARE_PERCENT: "50"}, labels={INJECT: "true"}, command=WAIT)
    assert cluster.plane.kubectl("create", "-n", how, "-f", "-", given=[asked]).returncode == 0
    eventually(lambda: [lease for lease in cluster.leases() if lease.state is LeaseState.ACTIVE], "the lease")
    if how == "killed":
        cluster.kubelet.kill(how, "train")
    else:
        about = {"name": "train", "namespace": how}
        eviction = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": about}
        path = f"/api/v1/namespaces/{how}/pods/train/eviction"
        cluster.plane.api.post(path, json=eviction).raise_for_status()
    eventually(lambda: not cluster.leases(), "the end of the lease")


def test_a_pod_that_starts_while_the_pool_is_down_runs_when_it_is_back(
    cluster: Cluster, eventually: Callable[..., Any]
) -> None:
    cluster.open_namespace("patient")
    cluster.server.stop()
    asked = pod({GPU: "1", SHARE_PERCENT: "50"}, labels={INJECT: "true"}, command=["echo", "trained"])
    try:
        assert cluster.plane.kubectl("create", "-n", "patient", "-f", "-", given=[asked]).returncode == 0
        eventually(lambda: "Waiting for the pool: " in cluster.log("patient", "train"), "that it waits")
    finally:
        cluster.server.start()
    eventually(lambda: cluster.phase("patient", "train") != "Running", "the end of the Pod")
    assert cluster.phase("patient", "train") == "Succeeded", cluster.log("patient", "train")


def test_a_pod_waits_for_its_secret(cluster: Cluster, eventually: Callable[..., Any]) -> None:
    cluster.plane.new_namespace("later")
    asked = pod({GPU: "1"}, labels={INJECT: "true"}, command=["true"])
    assert cluster.plane.kubectl("create", "-n", "later", "-f", "-", given=[asked]).returncode == 0

    def warned() -> bool:
        events = cluster.plane.get("events", "-n", "later")["items"]
        return any(
            e["reason"] == "FailedMount" and 'secret "gpupool" not found' in e["message"] for e in events
        )

    eventually(warned, "the event")
    assert cluster.phase("later", "train") == "Pending"
    made = cluster.server.token(description="later")
    data = {file: base64.b64encode(text.encode()).decode() for file, text in made["files"].items()}
    metadata = {"name": "gpupool", "namespace": "later"}
    cluster.plane.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})
    eventually(lambda: cluster.phase("later", "train") == "Succeeded", "the Pod")


def test_a_pod_that_the_webhook_did_not_see_stays_pending(
    cluster: Cluster, eventually: Callable[..., Any]
) -> None:
    """Before 1.28 the API server sends only Pods with the label."""
    plane = cluster.plane
    plane.new_namespace("unseen")
    assert (
        plane.kubectl(
            "create", "-n", "unseen", "-f", "-", given=[pod({GPU: "1"}, command=["true"])]
        ).returncode
        == 0
    )

    def unschedulable() -> bool:
        conditions = plane.get("pod", "train", "-n", "unseen")["status"].get("conditions", [])
        return any(f"Insufficient {GPU}" in c.get("message", "") for c in conditions)

    eventually(unschedulable, "the scheduler's word")
    assert cluster.phase("unseen", "train") == "Pending"


def test_while_the_webhook_is_down_only_pods_that_ask_are_refused(
    cluster: Cluster, eventually: Callable[..., Any]
) -> None:
    plane = cluster.plane
    plane.new_namespace("down")
    cluster.webhook.process.send_signal(signal.SIGKILL)
    cluster.webhook.process.wait()
    other = pod(command=["true"])
    other["metadata"]["name"] = "other"
    assert plane.kubectl("create", "-n", "down", "-f", "-", given=[other]).returncode == 0
    eventually(lambda: cluster.phase("down", "other") == "Succeeded", "the other Pod")
    asks = plane.kubectl("create", "-n", "down", "-f", "-", given=[figure_12()])
    assert asks.returncode == 1
    assert 'failed calling webhook "pods.gpupool.io"' in asks.stderr
    assert [p["metadata"]["name"] for p in plane.get("pods", "-n", "down")["items"]] == ["other"]
