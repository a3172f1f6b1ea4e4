"""The manifests of the webhook. Pure functions, which return objects as JSON."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import yaml

from .admission_policy import admission_policies
from .injection import asks_in_cel, not_injected_in_cel
from .manifest_parts import container, labels, named, of_secret, pod
from .names import DOMAIN, INJECT
from .webhook import PATH, READY_PATH

#: The name of all objects.
NAME = "gpupool-webhook"
#: The first version whose API server takes matchConditions by default: 1.27 drops them without a word.
MATCH_CONDITIONS = (1, 28)
#: The first version with PodDisruptionBudgets of policy/v1.
DISRUPTION_V1 = (1, 21)
#: How long the API server waits for an answer, in seconds.
TIMEOUT_S = 5
_PORT = 8443
_LABELS = labels(NAME)


@dataclass(frozen=True)
class TLS:
    """A certificate with its key, and the authority to trust; all in PEM."""

    certificate: bytes
    key: bytes
    ca: bytes


@dataclass(frozen=True)
class Options:
    """``version``: of the API server, such as (1, 30). ``tls`` or ``issuer``: who certifies the webhook.

    ``issuer``: a ClusterIssuer of cert-manager. ``client_image``: whence the client is copied; empty: ``image``.
    ``user_prefix``: of the cluster's ServiceAccounts in the pool, for the controller. ``pool_gpus``: GPUs of a pool
    within the cluster, 0 for emulated ones; ``monitoring_namespace``: of the Prometheus that reads its metrics.
    ``farm``: the pool has so many GPUs on each node; ``database``: Secret and key with the URL of the PostgreSQL that
    two pool servers share. ``admission``: what serves Pods, ``webhook``, ``policy`` (in the API server), or ``both``.
    """

    image: str
    namespace: str = "gpupool-system"
    version: tuple[int, int] = MATCH_CONDITIONS
    replicas: int = 2
    tls: TLS | None = None
    issuer: str = ""
    gpu_memory_mib: int | None = None
    account_tokens: bool = False
    client_image: str = ""
    user_prefix: str | None = None
    pool_gpus: int = 0
    monitoring_namespace: str = ""
    admission: str = "webhook"
    farm: bool = False
    database: tuple[str, str] | None = None


def dns_names(namespace: str) -> list[str]:
    """Return the names by which the API server calls the webhook."""
    return [f"{NAME}.{namespace}.svc", f"{NAME}.{namespace}.svc.cluster.local"]


def manifests(options: Options) -> list[dict[str, Any]]:
    """Return all objects in the order in which to create them: the configuration is the last."""
    policies: list[dict[str, Any]] = []
    if options.admission != "webhook":
        policies = admission_policies(
            options.namespace, options.version, _LABELS, options.gpu_memory_mib, options.account_tokens
        )
    if options.admission == "policy":
        return [_namespace(options), *policies]
    return [
        _namespace(options),
        _object("v1", "ServiceAccount", options, automountServiceAccountToken=False),
        _certificate(options),
        _service(options),
        _deployment(options),
        _disruption_budget(options),
        _network_policy(options),
        *policies,
        _configuration(options),
    ]


class _Plain(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes an object that occurs twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def disruption_version(options: Options) -> str:
    """Return the version of PodDisruptionBudgets."""
    return "policy/v1" if options.version >= DISRUPTION_V1 else "policy/v1beta1"


def as_yaml(objects: list[dict[str, Any]]) -> str:
    """Return the objects as one YAML stream."""
    return str(yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=110))


def _object(version: str, kind: str, options: Options, **fields: Any) -> dict[str, Any]:
    return named(version, kind, NAME, options.namespace, **fields)


def _namespace(options: Options) -> dict[str, Any]:
    labels = {
        **_LABELS,
        "kubernetes.io/metadata.name": options.namespace,  # API servers before 1.21 do not set it
        "pod-security.kubernetes.io/enforce": "restricted",
    }
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": options.namespace, "labels": labels},
    }


def _certificate(options: Options) -> dict[str, Any]:
    if options.tls is None:
        spec = {
            "secretName": NAME,
            "dnsNames": dns_names(options.namespace),
            "issuerRef": {"kind": "ClusterIssuer", "name": options.issuer},
            "privateKey": {"algorithm": "ECDSA", "rotationPolicy": "Always"},
        }
        return _object("cert-manager.io/v1", "Certificate", options, spec=spec)
    files = {
        "ca.crt": options.tls.ca,
        "tls.crt": options.tls.certificate,
        "tls.key": options.tls.key,
    }
    data = {name: base64.b64encode(content).decode() for name, content in files.items()}
    return _object("v1", "Secret", options, type="kubernetes.io/tls", data=data)


def _service(options: Options) -> dict[str, Any]:
    # The protocol is a part of a port's key, without which older API servers refuse a server-side apply.
    ports = [{"name": "https", "port": 443, "targetPort": "https", "protocol": "TCP"}]
    return _object("v1", "Service", options, spec={"selector": _LABELS, "ports": ports})


def _deployment(options: Options) -> dict[str, Any]:
    command = ["gpupool", "kubernetes", "webhook", "--certificate", "/tls/tls.crt", "--key", "/tls/tls.key"]
    if options.gpu_memory_mib is not None:
        command += ["--gpu-memory", str(options.gpu_memory_mib)]
    if options.account_tokens:
        command.append("--account-tokens")
    command += ["--client-image", options.client_image or options.image]
    program = container(
        "webhook",
        options.image,
        volume="tls",
        folder="/tls",
        command=command,
        ports=[{"name": "https", "containerPort": _PORT, "protocol": "TCP"}],
        readinessProbe={
            "httpGet": {"path": READY_PATH, "port": "https", "scheme": "HTTPS"},
            "periodSeconds": 2,
        },
        livenessProbe={"tcpSocket": {"port": "https"}, "periodSeconds": 10},
    )
    apart = {"labelSelector": {"matchLabels": _LABELS}, "topologyKey": "kubernetes.io/hostname"}
    affinity = {
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]
        }
    }
    template = pod(
        NAME,
        program,
        volume="tls",
        source=of_secret(NAME),
        automountServiceAccountToken=False,
        terminationGracePeriodSeconds=20,
        affinity=affinity,
    )
    spec = {
        "replicas": options.replicas,
        "selector": {"matchLabels": _LABELS},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {"metadata": {"labels": _LABELS}, "spec": template},
    }
    return _object("apps/v1", "Deployment", options, spec=spec)


def _disruption_budget(options: Options) -> dict[str, Any]:
    spec = {"minAvailable": 1, "selector": {"matchLabels": _LABELS}}
    return _object(disruption_version(options), "PodDisruptionBudget", options, spec=spec)


def _network_policy(options: Options) -> dict[str, Any]:
    """Anybody may ask, because an API server has no label; the webhook itself asks nobody."""
    spec = {
        "podSelector": {"matchLabels": _LABELS},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"protocol": "TCP", "port": "https"}]}],
        "egress": [],
    }
    return _object("networking.k8s.io/v1", "NetworkPolicy", options, spec=spec)


def _configuration(options: Options) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": NAME, "labels": _LABELS}
    service = {"namespace": options.namespace, "name": NAME, "path": PATH, "port": 443}
    client: dict[str, Any] = {"service": service}
    if options.tls is not None:
        client["caBundle"] = base64.b64encode(options.tls.ca).decode()
    else:
        metadata["annotations"] = {"cert-manager.io/inject-ca-from": f"{options.namespace}/{NAME}"}
    rule = {
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["pods"],
        "scope": "*",
    }
    webhook: dict[str, Any] = {
        "name": f"pods.{DOMAIN}",
        "clientConfig": client,
        "rules": [rule],
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "timeoutSeconds": TIMEOUT_S,
        "failurePolicy": "Fail",
        "reinvocationPolicy": "IfNeeded",
        "namespaceSelector": {
            "matchExpressions": [
                {
                    "key": "kubernetes.io/metadata.name",
                    "operator": "NotIn",
                    "values": [options.namespace, "kube-system"],
                }
            ]
        },
    }
    if options.version >= MATCH_CONDITIONS:
        webhook["matchConditions"] = [{"name": "asks-for-gpus", "expression": asks_in_cel()}]
        if options.admission == "both":
            # So that these start while no webhook answers.
            condition = {"name": "not-served-by-the-policy", "expression": not_injected_in_cel()}
            webhook["matchConditions"].append(condition)
    else:
        webhook["objectSelector"] = {"matchLabels": {INJECT: "true"}}
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": metadata,
        "webhooks": [webhook],
    }
