"""The manifests of the controller. Pure functions, which return objects as JSON."""

from __future__ import annotations

from typing import Any

from .controller_policy import POLICIES_V1, creation_policy
from .custom_resources import SERVERS, SLICES, definitions
from .manifest_parts import container, labels, named, of_secret, pod
from .manifests import Options, disruption_version
from .names import CONFIG_MAP, DEFAULT_SECRET, DOMAIN, FOLDER

#: The name of all objects, and of the Secret with an administrator's bundle.
NAME = "gpupool-controller"
ADMINISTRATOR = "gpupool-administrator"
_LABELS = labels(NAME)


def controller_manifests(options: Options) -> list[dict[str, Any]]:
    """Return the objects, to be created in the webhook's namespace."""
    has_policies = options.version >= POLICIES_V1
    return [
        *definitions(),
        *(creation_policy(NAME, options.namespace, _LABELS) if has_policies else []),
        _viewers_role(),
        _object("v1", "ServiceAccount", options),
        _role(options),
        _binding(options),
        _own_role(options),
        _own_binding(options),
        _disruption_budget(options),
        _deployment(options),
    ]


def _object(version: str, kind: str, options: Options, **fields: Any) -> dict[str, Any]:
    return named(version, kind, NAME, options.namespace, **fields)


def _role(options: Options) -> dict[str, Any]:
    """The least: it sees no Secret but those of one name. Only creating one cannot be limited so, not even by its type,
    so that who has this account can have a token of any other made, and read it."""
    rules = [
        {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["resourcequotas", "nodes", "pods"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
        {
            "apiGroups": [""],
            "resources": ["secrets"],
            "resourceNames": [DEFAULT_SECRET],
            "verbs": ["get", "list", "watch", "patch"],
        },
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": [CONFIG_MAP],
            "verbs": ["list", "watch", "patch"],
        },
        {"apiGroups": [""], "resources": ["secrets", "configmaps"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]},
        {
            "apiGroups": [DOMAIN],
            "resources": [SLICES, SERVERS],
            "verbs": ["list", "watch", "create", "patch", "delete"],
        },
    ]
    metadata = {"name": NAME, "labels": _LABELS}
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": metadata,
        "rules": rules,
    }


def _viewers_role() -> dict[str, Any]:
    """Return what lets all see Slices who may see Pods there."""
    aggregated = {"rbac.authorization.k8s.io/aggregate-to-view": "true"}
    rules = [{"apiGroups": [DOMAIN], "resources": [SLICES], "verbs": ["get", "list", "watch"]}]
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "gpupool-view", "labels": {**_LABELS, **aggregated}},
        "rules": rules,
    }


def _binding(options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": NAME, "labels": _LABELS},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAME},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": options.namespace}],
    }


def _own_role(options: Options) -> dict[str, Any]:
    """Return the rights in the controller's own namespace: the Lease by which one of its Pods leads."""
    leases = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    rules = [{**leases, "resourceNames": [NAME], "verbs": ["get", "update"]}, {**leases, "verbs": ["create"]}]
    return _object("rbac.authorization.k8s.io/v1", "Role", options, rules=rules)


def _own_binding(options: Options) -> dict[str, Any]:
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": NAME}
    subjects = [{"kind": "ServiceAccount", "name": NAME, "namespace": options.namespace}]
    return _object("rbac.authorization.k8s.io/v1", "RoleBinding", options, roleRef=role, subjects=subjects)


def _disruption_budget(options: Options) -> dict[str, Any]:
    spec = {"minAvailable": 1, "selector": {"matchLabels": _LABELS}}
    return _object(disruption_version(options), "PodDisruptionBudget", options, spec=spec)


def _deployment(options: Options) -> dict[str, Any]:
    volume = "administrator"
    command = ["gpupool", "kubernetes", "controller", "--namespace", options.namespace]
    if options.user_prefix is not None:
        command.append(f"--user-prefix={options.user_prefix}")
    program = container(
        "controller",
        options.image,
        volume=volume,
        folder=FOLDER,
        env={"GPUPOOL_CONFIG_DIR": FOLDER},
        command=command,
    )
    template = pod(NAME, program, volume=volume, source=of_secret(ADMINISTRATOR))
    # One of them leads, and the other one takes over when it is gone.
    spec = {
        "replicas": options.replicas,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": _LABELS},
        "template": {"metadata": {"labels": _LABELS}, "spec": template},
    }
    return _object("apps/v1", "Deployment", options, spec=spec)
