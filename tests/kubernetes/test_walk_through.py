"""docs/deployments/kubernetes: its commands and manifests, as they are written there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from jupyter_gpupool.kubernetes.injection import injected
from jupyter_gpupool.kubernetes.names import DEFAULT_SECRET

from ..server.daemon.conftest import gpupool
from .cluster import Cluster, needs_api_server
from .pods import FIGURE_12, missing_line
from .running_controller import RunningController

FOLDER = Path(__file__).parents[2] / "docs" / "deployments" / "kubernetes"
POD = "pod-pytorch-mock-bitfusion"
#: The oldest and the newest Kubernetes that the schemas know.
VERSIONS = ("1.28", "1.37")


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", (FOLDER / "README.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_its_manifests_are_valid_and_all_are_used(version: str) -> None:
    files = sorted(file.name for file in FOLDER.glob("*.yaml"))
    assert files == sorted(word for line in commands() for word in line.split() if word.endswith(".yaml"))
    for name in files:
        for one in documents(name):
            kubernetes_validate.validate(one, version, strict=True)


def test_its_pod_is_the_case_studys_but_for_the_image() -> None:
    (pod,) = documents("pod.yaml")
    pod["spec"]["containers"][0]["image"] = FIGURE_12["spec"]["containers"][0]["image"]
    assert pod == FIGURE_12
    after = injected(pod)
    assert after is not None
    assert after["spec"]["containers"][0]["resources"]["limits"] == {"gpupool.io/slice": "160"}


@needs_api_server
def test_it_leads_from_a_new_namespace_to_a_pod_that_has_trained(
    cluster: Cluster, controller: RunningController, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    plane = cluster.plane
    (claim,) = documents("claim.yaml")
    volume = {
        "capacity": claim["spec"]["resources"]["requests"],
        "accessModes": claim["spec"]["accessModes"],
        "storageClassName": claim["spec"]["storageClassName"],
        "hostPath": {"path": str(tmp_path)},
    }
    plane.create({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "pv"}, "spec": volume})
    bundle = str(cluster.server.folder / "admin")

    def has(*words: str) -> bool:
        return plane.kubectl("get", *words, "-n", "cnasg").returncode == 0

    def slices() -> list[Any]:
        return list(plane.get("slices", "-n", "cnasg")["items"])

    def events() -> set[str]:
        return {event["reason"] for event in plane.get("events", "-n", "cnasg")["items"]}

    def valid_tokens() -> list[Any]:
        tokens = cluster.administrator.tokens()
        return [t for t in tokens if t["namespace"] == "cnasg" and t["state"] == "valid"]

    #: What a reader sees before the command works: what it begins with → until when, and what that is.
    before: dict[str, tuple[Callable[[], Any], str]] = {
        "gpupool namespace list": (lambda: has("secret", DEFAULT_SECRET), "the Secret"),
        "kubectl create secret": (lambda: has("serviceaccount", "default"), "the account"),
        "kubectl get slices": (slices, "a Slice"),
        "kubectl logs": (lambda: cluster.phase("cnasg", POD) in ("Succeeded", "Failed"), "the Pod's end"),
        "kubectl describe": (lambda: {"Granted", "Released"} <= events(), "the Pod's Events"),
    }
    said: dict[str, str] = {}
    for line in commands():
        for start, (condition, what) in before.items():
            if line.startswith(start):
                eventually(condition, what)
        program, *words = shlex.split(line)
        words = [str(FOLDER / word) if word.endswith(".yaml") else word for word in words]
        done = plane.kubectl(*words) if program == "kubectl" else gpupool(*words, GPUPOOL_CONFIG_DIR=bundle)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        said[" ".join(line.split()[:3])] = done.stdout
    assert "cnasg" in said["gpupool namespace list"]
    assert DEFAULT_SECRET in said["kubectl get secret"]
    assert POD in said["kubectl get slices"]
    log = said[f"kubectl logs {POD}"]
    assert missing_line(log) == "", log
    assert "Granted GPUs 0 1 of" in said["kubectl describe pod"]
    assert "cnasg" in said["gpupool usage --by"]
    assert (tmp_path / "mnist_cnn.pt").stat().st_size > 0
    (namespace,) = [n for n in cluster.administrator.namespaces() if n["name"] == "cnasg"]
    assert (namespace["limits"]["gpus"], namespace["limits"]["leases"]) == (4, 10)
    assert cluster.leases() == []
    eventually(lambda: not valid_tokens(), "the end of the namespace's tokens")
