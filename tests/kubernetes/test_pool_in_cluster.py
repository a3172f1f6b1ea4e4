"""A pool within the cluster, of the objects that `gpupool kubernetes manifests --pool` prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from jupyter_gpupool.kubernetes.pool_manifests import METRICS_PORT, NAME, pool_addresses

from ..server.daemon.conftest import gpupool
from ..support.ports import free_ports
from .cluster import Cluster, needs_api_server

pytestmark = needs_api_server

SYSTEM = "gpupool-system"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifests")
    options = ["--image", "gpupool:1", "--tls", str(folder / "tls"), "--kubernetes", "1.20"]
    options += ["--pool", "0", "--service-monitor", "monitoring", "--controller"]
    done = gpupool("kubernetes", "manifests", *options, "--output", folder / "base")
    assert done.returncode == 0, done.stderr
    return folder / "base"


def objects(base: Path) -> list[dict[str, Any]]:
    files = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    return [yaml.safe_load((base / file).read_text()) for file in files]


def test_kubectl_applies_the_base(cluster: Cluster, base: Path) -> None:
    plane = cluster.plane
    rendered = plane.kubectl("kustomize", str(base))
    assert rendered.returncode == 0, rendered.stderr

    def in_order(found: list[Any]) -> list[str]:
        return sorted(json.dumps(one, sort_keys=True) for one in found)

    assert in_order(list(yaml.safe_load_all(rendered.stdout))) == in_order(objects(base))
    # What the Prometheus operator brings.
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": "ServiceMonitor", "plural": "servicemonitors", "singular": "servicemonitor"}
    spec = {"group": "monitoring.coreos.com", "scope": "Namespaced", "names": names, "versions": [version]}
    metadata = {"name": "servicemonitors.monitoring.coreos.com"}
    definition = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
    plane.create({**definition, "metadata": metadata, "spec": spec})
    plane.wait(
        lambda: plane.kubectl("get", "servicemonitors", "--all-namespaces").returncode == 0, "the definition"
    )
    plane.new_namespace(SYSTEM)
    done = plane.kubectl("apply", "--dry-run=server", "-k", str(base))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(server dry run)") == len(objects(base))


def test_the_pool_serves_and_keeps_its_directory(
    cluster: Cluster, base: Path, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    plane, ports = cluster.plane, free_ports(3)
    (deployment,) = [
        one for one in objects(base) if one["kind"] == "Deployment" and one["metadata"]["name"] == NAME
    ]
    (claim,) = [one for one in objects(base) if one["kind"] == "PersistentVolumeClaim"]
    (account,) = [
        one for one in objects(base) if one["kind"] == "ServiceAccount" and one["metadata"]["name"] == NAME
    ]
    # All Pods of this node share its ports and names.
    spec = deployment["spec"]["template"]["spec"]
    init, server = spec["initContainers"][0]["command"], spec["containers"][0]["command"]
    init[init.index(pool_addresses(SYSTEM)[0])] = "localhost"
    init[-1:] = ["--port", str(ports[0]), "--data-port", str(ports[1]), init[-1]]
    server[2] = server[2].replace(f"0.0.0.0:{METRICS_PORT}", f"127.0.0.1:{ports[2]}")
    plane.new_namespace(SYSTEM)
    size = claim["spec"]["resources"]["requests"]
    volume = {"capacity": size, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": str(tmp_path)}}
    metadata = {"name": "gpupool-ledger"}
    plane.create({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": volume})
    plane.create(account, claim, deployment)
    bundle = str(tmp_path / "server" / "admin")
    ready = tmp_path / "server" / "gpupool_config.py"

    def answers() -> bool:
        # Without a bundle, the command would start a pool of its own.
        return ready.exists() and gpupool("gpus", GPUPOOL_CONFIG_DIR=bundle).returncode == 0

    def pods() -> list[str]:
        return [pod["metadata"]["name"] for pod in plane.get("pods", "-n", SYSTEM)["items"]]

    eventually(answers, "the pool")
    output = ("--output", tmp_path / "kept.tar")
    made = gpupool("token", "create", "--description", "kept", *output, GPUPOOL_CONFIG_DIR=bundle)
    assert made.returncode == 0, made.stderr
    metrics = httpx.get(f"http://127.0.0.1:{ports[2]}/metrics", trust_env=False)
    assert "gpupool_up 1" in metrics.text
    scale = ("scale", "deployment", NAME, "-n", SYSTEM)
    plane.kubectl(*scale, "--replicas=0")
    eventually(lambda: not pods(), "the end of the Pod")
    plane.kubectl(*scale, "--replicas=1")
    eventually(answers, "the pool, by another Pod")
    (pod,) = pods()
    assert "Kept /var/lib/gpupool/server" in plane.kubectl("logs", pod, "-c", "init", "-n", SYSTEM).stdout
    assert "kept" in gpupool("token", "list", GPUPOOL_CONFIG_DIR=bundle).stdout
    plane.kubectl(*scale, "--replicas=0")
    eventually(lambda: not pods(), "the end of the Pod")
