"""What the webhook puts into a Pod. Pure functions of JSON."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.client import bundle
from jupyter_gpupool.core.environment import NODE_NAME, POD_NAME, POD_NAMESPACE, POD_UID
from jupyter_gpupool.core.errors import InvalidRequest

from .names import (
    ACCOUNT_TOKEN_LIFE_S,
    ASKED,
    AUDIENCE,
    CLIENT,
    CLIENT_FOLDER,
    CLIENT_VOLUME,
    CONFIG_MAP,
    DOMAIN,
    FOLDER,
    INJECT,
    INJECTED,
    SECRET,
    SLICE,
    VOLUME,
)
from .pod_request import NUM_GPUS, PARTIAL_GPU, PodRequest, listed, mapping, pod_request, resources

#: What precedes a container's command. A Pod that starts while the pool is down waits for it.
RUN = ("gpupool", "run", "--wait-for-pool")
#: The user of the init container, which needs no rights, and whose files everybody may read.
_UID = 10001
#: By which Python finds a copied client.
_PATH = "PYTHONPATH"
#: The permissions of the bundle's files: containers may run as any user.
_MODE = 0o444

#: The variable with the folder of the bundle.
CONFIG_DIR = bundle.VARIABLE
#: Variable → field of the Pod, which the kubelet fills in.
DOWNWARD = {
    POD_NAME: "metadata.name",
    POD_NAMESPACE: "metadata.namespace",
    POD_UID: "metadata.uid",
    NODE_NAME: "spec.nodeName",
}


@dataclass(frozen=True)
class Settings:
    """``gpu_memory_mib``: memory of the pool's smallest GPU; without it, MiB count as whole GPUs.

    ``account_tokens``: Pods that say neither, and name no Secret, use the tokens of their ServiceAccounts.
    ``client_image``: contains the client, for Pods whose own image does not; empty: there can be no such Pods.
    """

    gpu_memory_mib: int | None = None
    account_tokens: bool = False
    client_image: str = ""


def injected(pod: Mapping[str, Any], settings: Settings = Settings()) -> dict[str, Any] | None:
    """Return the Pod with what it asks for, None where nothing is to be done. Raises InvalidRequest with one line."""
    if is_injected(pod):
        return None
    request = pod_request(pod)
    if request is None:
        return None
    after = copy.deepcopy(dict(pod))
    _put_label(after)
    spec = after["spec"]
    container = spec["containers"][request.container]
    _put_volume(spec, _volume(request, settings, mapping(mapping(pod, "metadata"), "annotations")))
    _put_mount(container, VOLUME, FOLDER)
    if request.copies_client:
        _put_client(spec, container, request, settings)
    _put_environment(container, request)
    _put_resources(container, request.slices(settings.gpu_memory_mib))
    if request.wrapped:
        program, *words = RUN
        if request.copies_client:
            program = f"{CLIENT_FOLDER}/bin/{program}"
        container["command"] = [program, *words, *request.options(), "--", *container["command"]]
    return after


def is_injected(pod: Mapping[str, Any]) -> bool:
    """Return whether the webhook has been here: a container has slices, and the bundle is mounted in it."""
    labels = mapping(mapping(pod, "metadata"), "labels")
    return labels.get(INJECT) != "false" and any(
        SLICE in resources(container)
        and not any(name in ASKED for name in resources(container))
        and any(
            (m.get("name"), m.get("mountPath")) == (VOLUME, FOLDER) for m in listed(container, "volumeMounts")
        )
        for container in listed(mapping(pod, "spec"), "containers")
    )


def asks_in_cel() -> str:
    """Return a condition in CEL that holds for every Pod that could ask: the label, or a resource of ours."""
    return (
        f"(has(object.metadata.labels) && '{INJECT}' in object.metadata.labels"
        f" && object.metadata.labels['{INJECT}'] == 'true')"
        " || (object.spec.containers + (has(object.spec.initContainers) ? object.spec.initContainers : []))"
        f".exists(c, has(c.resources) && has(c.resources.limits)"
        f" && c.resources.limits.exists(name, name.startsWith('{DOMAIN}/')))"
    )


def is_injected_in_cel(container: str) -> str:
    """Return in CEL that :func:`is_injected` holds for the sake of this container, but for the Pod's label."""
    names = ", ".join(f"'{name}'" for name in ASKED)
    limits, mounts = f"{container}.resources.limits", f"{container}.volumeMounts"
    return (
        f"has({container}.resources) && has({limits}) && '{SLICE}' in {limits}"
        f" && !{limits}.exists(name, name in [{names}])"
        f" && has({mounts}) && {mounts}.exists(m, m.name == '{VOLUME}' && m.mountPath == '{FOLDER}')"
    )


def not_injected_in_cel() -> str:
    """Return in CEL that :func:`is_injected` does not hold."""
    return f"!object.spec.containers.exists(c, {is_injected_in_cel('c')})"


def _put_label(pod: dict[str, Any]) -> None:
    metadata = dict(mapping(pod, "metadata"))
    pod["metadata"] = {**metadata, "labels": {**mapping(metadata, "labels"), INJECTED: "true"}}


def _volume(request: PodRequest, settings: Settings, annotations: Mapping[str, Any]) -> dict[str, Any]:
    by_account = request.account_token
    if by_account is None:
        by_account = settings.account_tokens and SECRET not in annotations
    return account_volume() if by_account else secret_volume(request.secret)


def secret_volume(name: str) -> dict[str, Any]:
    """Return the volume with the bundle of a Secret."""
    return {"name": VOLUME, "secret": {"secretName": name, "defaultMode": _MODE}}


def account_volume() -> dict[str, Any]:
    """Return the volume with the pool's addresses and the token of the Pod's ServiceAccount."""
    token = {"audience": AUDIENCE, "expirationSeconds": ACCOUNT_TOKEN_LIFE_S, "path": bundle.TOKEN}
    items = [{"key": name, "path": name} for name in (bundle.CA, bundle.SERVERS)]
    sources = [{"serviceAccountToken": token}, {"configMap": {"name": CONFIG_MAP, "items": items}}]
    return {"name": VOLUME, "projected": {"defaultMode": _MODE, "sources": sources}}


def _put_volume(spec: dict[str, Any], ours: dict[str, Any]) -> None:
    volumes = listed(spec, "volumes")
    name = ours["name"]
    if any(volume.get("name") == name for volume in volumes):
        raise InvalidRequest(f"the volume name {name} is taken; give the Pod's own volume another name")
    spec["volumes"] = [*volumes, ours]


def _put_mount(container: dict[str, Any], volume: str, folder: str) -> None:
    mounts = listed(container, "volumeMounts")
    if any(str(mount.get("mountPath")).rstrip("/") == folder for mount in mounts):
        raise InvalidRequest(f"the container mounts a volume at {folder}; give it another path")
    container["volumeMounts"] = [*mounts, mount_of(volume, folder)]


def mount_of(volume: str, folder: str) -> dict[str, Any]:
    """Return the mount of a volume of ours."""
    # Not a subPath: the kubelet would never replace the file when the token is rotated.
    return {"name": volume, "mountPath": folder, "readOnly": True}


def _put_client(
    spec: dict[str, Any], container: dict[str, Any], request: PodRequest, settings: Settings
) -> None:
    """Let an init container copy the client, and the container find it."""
    if not settings.client_image:
        raise InvalidRequest(
            f"{CLIENT}: copy needs an image to copy the client from, which this cluster's webhook does not have; "
            "use an image that contains jupyter_gpupool"
        )
    before = listed(spec, "initContainers")
    if any(other.get("name") == CLIENT_VOLUME for other in before):
        raise InvalidRequest(
            f"the name {CLIENT_VOLUME} is taken; give the Pod's own init container another name"
        )
    _put_volume(spec, {"name": CLIENT_VOLUME, "emptyDir": {"sizeLimit": "256Mi"}})
    _put_mount(container, CLIENT_VOLUME, CLIENT_FOLDER)
    spec["initContainers"] = [*before, _copying(settings.client_image)]
    if not request.wrapped:
        # What the program imports it by. The image's own value cannot be seen; the copied command keeps that.
        _prepend_path(container, f"{CLIENT_FOLDER}/lib")


def _copying(image: str) -> dict[str, Any]:
    """Return the init container. It passes quotas that want limits, and the strictest of the Pod security standards."""
    return {
        "name": CLIENT_VOLUME,
        "image": image,
        "command": ["gpupool", "kubernetes", "copy-client", CLIENT_FOLDER],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {
            "requests": {"cpu": "100m", "memory": "64Mi"},
            "limits": {"cpu": "1", "memory": "256Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": _UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": CLIENT_VOLUME, "mountPath": CLIENT_FOLDER}],
    }


def _prepend_path(container: dict[str, Any], folder: str) -> None:
    variables = list(listed(container, "env"))
    present = [n for n, variable in enumerate(variables) if variable.get("name") == _PATH]
    if any(variables[n].get("valueFrom") is not None for n in present):
        raise InvalidRequest(f"{_PATH} must have a value, to which the copied client can be added")
    if not present:
        container["env"] = [*variables, {"name": _PATH, "value": folder}]
        return
    for n in present:  # where they stand: $(PYTHONPATH) in a later variable means what stands before it
        former = str(variables[n].get("value") or "")
        variables[n] = {"name": _PATH, "value": f"{folder}:{former}" if former else folder}
    container["env"] = variables


def _put_environment(container: dict[str, Any], request: PodRequest) -> None:
    """Set what is missing; what the Pod's author has written stays."""
    wanted: dict[str, Any] = {NUM_GPUS: {"value": str(request.num_gpus)}}
    if request.partial is not None:
        wanted[PARTIAL_GPU] = {"value": f"{request.partial:.9g}"}
    wanted[CONFIG_DIR] = {"value": FOLDER}
    for name, path in DOWNWARD.items():
        wanted[name] = {"valueFrom": {"fieldRef": {"fieldPath": path}}}
    variables = listed(container, "env")
    present = {variable.get("name"): variable for variable in variables}
    blank = [
        n for n in (NUM_GPUS, PARTIAL_GPU) if n in present and not str(present[n].get("value") or "").strip()
    ]
    kept = [variable for variable in variables if variable.get("name") not in blank]
    container["env"] = [
        *kept,
        *({"name": name, **value} for name, value in wanted.items() if name not in present or name in blank),
    ]


def _put_resources(container: dict[str, Any], slices: int) -> None:
    both = dict(mapping(container, "resources"))
    for kind in ("limits", "requests"):
        kept = {name: value for name, value in mapping(both, kind).items() if name not in ASKED}
        both[kind] = {**kept, SLICE: str(slices)}
    container["resources"] = both
