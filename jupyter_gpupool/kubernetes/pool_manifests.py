"""The manifests of a pool within the cluster: a secured server on a node with GPUs. Pure functions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jupyter_gpupool.client.bundle import DEFAULT_PORT

from .manifest_parts import container, labels, named, pod
from .manifests import Options

#: The name of all objects, and the server's in its namespace.
NAME = "gpupool"
#: The volume with the server's directory, and where the container sees it.
VOLUME, FOLDER = "ledger", "/var/lib/gpupool"
DIRECTORY = f"{FOLDER}/server"
#: Where metrics are served without a token.
METRICS_PORT = 56002
_DATA_PORT = 55001
_LABELS = labels(NAME)


def pool_addresses(namespace: str) -> list[str]:
    """Return the names by which Pods know the server."""
    return [f"{NAME}.{namespace}.svc", f"{NAME}.{namespace}.svc.cluster.local", f"{NAME}.{namespace}"]


def pool_manifests(options: Options) -> list[dict[str, Any]]:
    """Return the objects, to be created in the webhook's namespace."""
    return [
        pool_object("v1", "ServiceAccount", options, automountServiceAccountToken=False),
        claim(options),
        service(options, tuple(ports())),
        _network_policy(options),
        *([service_monitor(options)] if options.monitoring_namespace else []),
        _deployment(options),
    ]


def pool_object(version: str, kind: str, options: Options, **fields: Any) -> dict[str, Any]:
    """Return an object of the pool's name."""
    return named(version, kind, NAME, options.namespace, **fields)


def claim(options: Options) -> dict[str, Any]:
    """Return the claim for the server's directory."""
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    return pool_object("v1", "PersistentVolumeClaim", options, spec=spec)


def ports() -> dict[str, int]:
    """Return the ports by name."""
    return {"control": DEFAULT_PORT, "data": _DATA_PORT, "metrics": METRICS_PORT}


def service(options: Options, names: Collection[str]) -> dict[str, Any]:
    """Return the Service with these ports."""
    found = [
        {"name": name, "port": port, "targetPort": name, "protocol": "TCP"}
        for name, port in ports().items()
        if name in names
    ]
    return pool_object("v1", "Service", options, spec={"selector": _LABELS, "ports": found})


def _network_policy(options: Options) -> dict[str, Any]:
    """Every Pod may reach the pool, which asks for a token; only Prometheus the port that asks for none."""
    ingress: list[dict[str, Any]] = [
        {"ports": [{"protocol": "TCP", "port": name} for name in ("control", "data")]}
    ]
    if options.monitoring_namespace:
        label = {"kubernetes.io/metadata.name": options.monitoring_namespace}
        ingress.append(
            {
                "from": [{"namespaceSelector": {"matchLabels": label}}],
                "ports": [{"protocol": "TCP", "port": "metrics"}],
            }
        )
    spec = {"podSelector": {"matchLabels": _LABELS}, "policyTypes": ["Ingress"], "ingress": ingress}
    return pool_object("networking.k8s.io/v1", "NetworkPolicy", options, spec=spec)


def service_monitor(options: Options) -> dict[str, Any]:
    """Return what lets Prometheus's operator read the metrics."""
    endpoint = {"port": "metrics", "path": "/metrics", "interval": "30s"}
    spec = {"selector": {"matchLabels": _LABELS}, "endpoints": [endpoint]}
    return pool_object("monitoring.coreos.com/v1", "ServiceMonitor", options, spec=spec)


def serves_pool(options: Options, without_emulation: str) -> list[str]:
    """Return the command of a pool server; ``without_emulation``: the option by which its engine emulates nothing."""
    command = ["gpupool", "server", f"--GPUPoolDaemon.metrics_address=0.0.0.0:{METRICS_PORT}"]
    return [*command, without_emulation if options.pool_gpus else "--emulate", DIRECTORY]


def _deployment(options: Options) -> dict[str, Any]:
    addresses = [word for name in pool_addresses(options.namespace) for word in ("--address", name)]
    makes = container(
        "init",
        options.image,
        volume=VOLUME,
        folder=FOLDER,
        read_only=False,
        command=["gpupool", "server", "init", "--keep", *addresses, DIRECTORY],
    )
    serves = container(
        "pool",
        options.image,
        volume=VOLUME,
        folder=FOLDER,
        read_only=False,
        command=serves_pool(options, "--LocalEngine.emulate=never"),
        ports=[{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports().items()],
        readinessProbe={"tcpSocket": {"port": "control"}, "periodSeconds": 5},
    )
    # Workers take what the programs need; only the GPUs can be said here.
    serves["resources"] = {"requests": {"cpu": "1", "memory": "2Gi"}}
    if options.pool_gpus:
        serves["resources"]["limits"] = {"nvidia.com/gpu": str(options.pool_gpus)}
    template = pod(
        NAME,
        serves,
        volume=VOLUME,
        source={"persistentVolumeClaim": {"claimName": NAME}},
        automountServiceAccountToken=False,
        initContainers=[makes],
    )
    template["volumes"][-1] = {"name": "tmp", "emptyDir": {}}  # for the files of workers
    spec = {
        "replicas": 1,
        # One pool for one ledger: the old one ends before the new one starts.
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": _LABELS},
        "template": {"metadata": {"labels": _LABELS}, "spec": template},
    }
    return pool_object("apps/v1", "Deployment", options, spec=spec)
