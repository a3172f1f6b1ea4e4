"""The manifests of a pool of several nodes within the cluster. Pure functions.

Pool servers in Pods without GPUs, and a GPU server on each node with GPUs. Ray joins them: its head runs in a Pod of
its own.
"""

from __future__ import annotations

from typing import Any

from .manifest_parts import container, labels, named, of_secret, pod
from .manifests import Options, disruption_version
from .pool_manifests import (
    DIRECTORY,
    FOLDER,
    NAME,
    claim,
    pool_addresses,
    pool_object,
    ports,
    serves_pool,
    service,
    service_monitor,
)

#: The Secret with the files ``ca.crt`` and ``ca.key`` of the pool's authority, and Ray's ``ray.token``.
AUTHORITY = "gpupool-authority"
#: The Service that gives each of several pool servers a name, Ray's head, and the GPU servers.
EACH, HEAD, SERVER = "gpupool-pool", "gpupool-ray", "gpupool-server"
#: The label by which NVIDIA's feature discovery marks nodes with GPUs.
HAS_GPUS = {"nvidia.com/gpu.present": "true"}
#: How many GPUs a GPU server has that emulates them.
EMULATED = 2
#: Pool servers on one database.
REPLICAS = 2
_RAY_PORT = 6379
_RAY_TOKEN = "/var/run/secrets/gpupool.io/ray"
#: The volume with the server's directory.
_VOLUME = "directory"
#: Ray stores nothing that is large: 80 MiB is its least.
_STORE = ["--num-cpus=0", f"--object-store-memory={80 << 20}"]
#: Ray shares these 80 MiB, and libraries what they exchange between processes.
_SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory"}}


def farm_addresses(options: Options) -> list[str]:
    """Return the names by which Pods know the pool's servers, in the order in which to ask them."""
    if options.database is None:
        return pool_addresses(options.namespace)
    return [f"{NAME}-{n}.{EACH}.{options.namespace}.svc" for n in range(REPLICAS)]


def farm_manifests(options: Options) -> list[dict[str, Any]]:
    """Return the objects, to be created in the webhook's namespace."""
    several = options.database is not None
    return [
        pool_object("v1", "ServiceAccount", options, automountServiceAccountToken=False),
        pool_object("v1", "ConfigMap", options, data={"gpupool_config.py": settings(options)}),
        *([] if several else [claim(options)]),
        service(options, ("control", "metrics")),
        *([_each(options), _disruption_budget(options)] if several else []),
        _network_policy(options, NAME, _pool_ingress(options)),
        _network_policy(options, HEAD, []),
        _network_policy(options, SERVER, [{"ports": [{"protocol": "TCP", "port": "data"}]}]),
        *([service_monitor(options)] if options.monitoring_namespace else []),
        _head_service(options),
        _head(options),
        _servers(options),
        _pool(options),
    ]


def settings(options: Options) -> str:
    """Return the pool servers' configuration."""
    lines = ["import os", "", "c = get_config()  # noqa", 'c.PoolService.engine_name = "ray"']
    names = ", ".join(f'"{name}"' for name in farm_addresses(options))
    if options.database is None:
        lines += [f"c.GPUPoolDaemon.addresses = [{names}]"]
    else:
        own = f'os.environ["POD_NAME"] + ".{EACH}.{options.namespace}.svc"'
        lines += [
            # Each is known to the other one by the first.
            f"c.GPUPoolDaemon.addresses = sorted([{names}], key=lambda name: name != {own})",
            'c.PoolService.db_url = os.environ["DATABASE_URL"]',
        ]
    return "\n".join(lines) + "\n"


def _each(options: Options) -> dict[str, Any]:
    """Return the Service by which clients find the one that leads: a common address would lead to either."""
    spec = {
        "clusterIP": "None",
        "selector": labels(NAME),
        "ports": [
            {"name": "control", "port": ports()["control"], "targetPort": "control", "protocol": "TCP"}
        ],
    }
    return named("v1", "Service", EACH, options.namespace, spec=spec)


def _disruption_budget(options: Options) -> dict[str, Any]:
    spec = {"minAvailable": 1, "selector": {"matchLabels": labels(NAME)}}
    return pool_object(disruption_version(options), "PodDisruptionBudget", options, spec=spec)


def _pool_ingress(options: Options) -> list[dict[str, Any]]:
    ingress: list[dict[str, Any]] = [{"ports": [{"protocol": "TCP", "port": "control"}]}]
    if options.monitoring_namespace:
        label = {"kubernetes.io/metadata.name": options.monitoring_namespace}
        metrics = [{"protocol": "TCP", "port": "metrics"}]
        ingress.append({"from": [{"namespaceSelector": {"matchLabels": label}}], "ports": metrics})
    return ingress


def _network_policy(options: Options, name: str, ingress: list[dict[str, Any]]) -> dict[str, Any]:
    """Let the Pods of the farm reach each other, because whoever reaches Ray's ports may run anything there."""
    members = {"key": "app.kubernetes.io/name", "operator": "In", "values": [NAME, HEAD, SERVER]}
    spec = {
        "podSelector": {"matchLabels": labels(name)},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchExpressions": [members]}}]}, *ingress],
    }
    return named("networking.k8s.io/v1", "NetworkPolicy", name, options.namespace, spec=spec)


def _head_service(options: Options) -> dict[str, Any]:
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": labels(HEAD),
        "ports": [{"name": "ray", "port": _RAY_PORT, "targetPort": "ray", "protocol": "TCP"}],
    }
    return named("v1", "Service", HEAD, options.namespace, spec=spec)


def _head(options: Options) -> dict[str, Any]:
    command = ["ray", "start", "--head", f"--port={_RAY_PORT}", "--node-ip-address=$(POD_IP)", "--num-gpus=0"]
    program = _member(
        options,
        "head",
        [*command, *_STORE, "--include-dashboard=false", "--disable-usage-stats", "--block"],
        {"cpu": "250m", "memory": "1Gi"},
        ports=[{"name": "ray", "containerPort": _RAY_PORT, "protocol": "TCP"}],
        readinessProbe={"tcpSocket": {"port": "ray"}, "periodSeconds": 5},
    )
    spec = {
        "serviceName": HEAD,
        "replicas": 1,
        # What Ray knows is in this Pod's memory, and all leases end with it.
        "updateStrategy": {"type": "OnDelete"},
        "selector": {"matchLabels": labels(HEAD)},
        "template": {"metadata": {"labels": labels(HEAD)}, "spec": _pod(program, [])},
    }
    return named("apps/v1", "StatefulSet", HEAD, options.namespace, spec=spec)


def _servers(options: Options) -> dict[str, Any]:
    command = ["ray", "start", f"--address={_head_address(options)}", "--node-ip-address=$(POD_IP)"]
    command += ["--node-name=$(NODE_NAME)", f"--num-gpus={options.pool_gpus or EMULATED}"]
    program = _member(
        options,
        "server",
        [*command, *_STORE, "--block"],
        {"cpu": "1", "memory": "4Gi"},
        fields={"NODE_NAME": "spec.nodeName"},
        ports=[{"name": "data", "containerPort": ports()["data"], "protocol": "TCP"}],
    )
    program["volumeMounts"].append({"name": _VOLUME, "mountPath": FOLDER, "readOnly": False})
    if options.pool_gpus:
        program["resources"]["limits"] = {"nvidia.com/gpu": str(options.pool_gpus)}
    template = _pod(program, [], shareProcessNamespace=True)
    template["volumes"].append({"name": _VOLUME, "emptyDir": {}})
    if options.pool_gpus:
        template["nodeSelector"] = HAS_GPUS
    spec = {
        # A lease ends with its GPU server, so the administrator says when each is replaced.
        "updateStrategy": {"type": "OnDelete"},
        "selector": {"matchLabels": labels(SERVER)},
        "template": {"metadata": {"labels": labels(SERVER)}, "spec": template},
    }
    return named("apps/v1", "DaemonSet", SERVER, options.namespace, spec=spec)


def _pool(options: Options) -> dict[str, Any]:
    joins = [
        "ray",
        "start",
        f"--address={_head_address(options)}",
        '--node-ip-address="$POD_IP"',
        "--num-gpus=0",
    ]
    serves = serves_pool(options, "--RayEngine.emulate=never")
    program = _member(
        options,
        "pool",
        ["sh", "-c", f"{' '.join([*joins, *_STORE])} && exec {' '.join(serves)}"],
        {"cpu": "500m", "memory": "1Gi"},
        fields={"POD_NAME": "metadata.name"},
        ports=[
            {"name": name, "containerPort": ports()[name], "protocol": "TCP"}
            for name in ("control", "metrics")
        ],
        readinessProbe={"tcpSocket": {"port": "control"}, "periodSeconds": 5},
    )
    makes = _certifies(options)
    held: dict[str, Any] = {"persistentVolumeClaim": {"claimName": NAME}}
    if options.database is not None:
        secret, key = options.database
        source = {"secretKeyRef": {"name": secret, "key": key}}
        for one in (makes, program):
            one["env"].append({"name": "DATABASE_URL", "valueFrom": source})
        held = {"emptyDir": {}}
    program["volumeMounts"].append({"name": _VOLUME, "mountPath": FOLDER, "readOnly": False})
    template = _pod(program, [makes], shareProcessNamespace=True)
    template["volumes"] += [
        _authority(),
        {"name": "settings", "configMap": {"name": NAME}},
        {"name": _VOLUME, **held},
    ]
    if options.database is not None:
        apart = {"labelSelector": {"matchLabels": labels(NAME)}, "topologyKey": "kubernetes.io/hostname"}
        preferred = [{"weight": 100, "podAffinityTerm": apart}]
        template["affinity"] = {
            "podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}
        }
    spec = {
        "serviceName": EACH if options.database is not None else NAME,
        "replicas": REPLICAS if options.database is not None else 1,
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": labels(NAME)},
        "template": {"metadata": {"labels": labels(NAME)}, "spec": template},
    }
    return pool_object("apps/v1", "StatefulSet", options, spec=spec)


def _certifies(options: Options) -> dict[str, Any]:
    """Return an init container that signs the certificate; the authority's key is not there afterwards."""
    steps = [
        "umask 077",
        f"mkdir -p {DIRECTORY}",
        f"cd {DIRECTORY}",
        "cp -f /authority/ca.crt /authority/ca.key /settings/gpupool_config.py .",
        "gpupool server renew .",
        "rm ca.key",
    ]
    made = container(
        "init",
        options.image,
        volume=_VOLUME,
        folder=FOLDER,
        read_only=False,
        command=["sh", "-c", " && ".join(steps)],
    )
    made["env"] += [_field("POD_IP", "status.podIP"), _field("POD_NAME", "metadata.name")]
    made["volumeMounts"] += [
        {"name": name, "mountPath": f"/{name}", "readOnly": True} for name in ("authority", "settings")
    ]
    return made


def _head_address(options: Options) -> str:
    return f"{HEAD}.{options.namespace}.svc:{_RAY_PORT}"


def _authority() -> dict[str, Any]:
    files = [{"key": name, "path": name} for name in ("ca.crt", "ca.key")]
    source = of_secret(AUTHORITY)
    source["secret"]["items"] = files
    return {"name": "authority", **source}


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _member(
    options: Options,
    name: str,
    command: list[str],
    requests: dict[str, str],
    fields: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a container that joins Ray. ``fields``: of the Pod, by variable."""
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{_RAY_TOKEN}/token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    made = container(name, options.image, volume="ray", folder=_RAY_TOKEN, env=env, command=command, **more)
    made["env"] += [_field(key, path) for key, path in {"POD_IP": "status.podIP", **(fields or {})}.items()]
    made["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    made["resources"] = {"requests": requests}
    return made


def _pod(program: dict[str, Any], first: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    source = of_secret(AUTHORITY)
    source["secret"]["items"] = [{"key": "ray.token", "path": "token"}]
    template = pod(
        NAME,
        program,
        volume="ray",
        source=source,
        automountServiceAccountToken=False,
        **({"initContainers": first} if first else {}),
        **fields,
    )
    # For the files of Ray and of workers.
    template["volumes"][-1:] = [{"name": "tmp", "emptyDir": {}}, _SHARED_MEMORY]
    return template
