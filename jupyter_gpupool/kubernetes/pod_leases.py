"""The Pods' leases: which Pod holds which, what it is told, and which leases nobody holds. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_gpupool.core.models import Lease, LeaseState

from .custom_resources import API_VERSION, POD_UID, SERVERS, SLICES, is_shown, server_of, slice_of
from .pod_events import PodEvent, events_of
from .pod_request import mapping

#: As a client in a Pod writes it into its request.
_POD_MARK = re.compile(r" pod:([0-9A-Za-z-]{1,36})(?= |$)")

#: What the API server calls its ServiceAccounts by, before namespace and name.
_ACCOUNT = "system:serviceaccount:"


@dataclass(frozen=True)
class TellPod:
    """Write an Event."""

    event: PodEvent


@dataclass(frozen=True)
class ReleaseLease:
    """Release a lease whose Pod is gone. Before that, the Pods of the namespace are looked at once more, or of all
    namespaces if it is empty."""

    id: str
    namespace: str
    pod_uid: str


@dataclass(frozen=True)
class Show:
    """Create or change a Slice or a GPUServer, which is ``wanted``."""

    path: str
    wanted: Mapping[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Hide:
    """Delete a Slice or a GPUServer."""

    path: str


PodAction = TellPod | ReleaseLease | Show | Hide


def pod_uid(lease: Lease) -> str:
    """Return the uid of the Pod that a lease says it is of; empty without one."""
    found = _POD_MARK.search(lease.request.client)
    return found[1] if found else ""


def is_over(pod: Mapping[str, Any]) -> bool:
    """Return whether none of a Pod's containers runs or will run again."""
    return mapping(pod, "status").get("phase") in ("Succeeded", "Failed")


def plan_pods(
    leases: Sequence[Lease],
    before: Mapping[str, Lease],
    pods: Sequence[Mapping[str, Any]],
    own: Collection[str],
    cluster: str,
    now: float,
    user_prefix: str | None = None,
) -> list[PodAction]:
    """Return what is to be done about the Pods' leases.

    ``leases``: as they are now, those included that have just ended; ``before``: as they were seen before, by id.
    ``own``: namespaces of the pool that are this cluster's; a lease of another one cannot be of a Pod here, whatever it
    says. ``cluster``: what tells this cluster from others, in the owner of its tokens. ``user_prefix``: what precedes
    the names of its ServiceAccounts in the pool; None: not known, so that their leases cannot be told from others'.
    """
    by_uid = {str(pod["metadata"]["uid"]): pod for pod in pods}
    actions: list[PodAction] = []
    for lease in leases:
        uid = pod_uid(lease)
        if not uid:
            continue
        pod, is_own = by_uid.get(uid), lease.request.namespace in own
        if is_own and pod is not None and pod["metadata"]["namespace"] == lease.request.namespace:
            known = before.get(lease.id)
            actions += map(TellPod, events_of(lease, known, pod, now))
        if lease.state.ended or not (pod is None or is_over(pod)):
            continue
        if is_own and is_of_cluster(lease, cluster):
            actions.append(ReleaseLease(lease.id, lease.request.namespace, uid))
        elif is_of_account(lease, user_prefix):  # whose token a Pod of another namespace may have
            actions.append(ReleaseLease(lease.id, "", uid))
    return actions


def plan_slices(
    leases: Sequence[Lease],
    present: Sequence[Mapping[str, Any]],
    pods: Sequence[Mapping[str, Any]],
    own: Collection[str],
) -> list[PodAction]:
    """Return what is to be done for each Pod to have the Slices of its live leases, else that of its last one.

    ``leases``: as :func:`plan_pods` has them. ``present``: the Slices of the cluster. The API server deletes those of a
    Pod that is gone.
    """
    shown, alive = {str(one["metadata"]["name"]): one for one in present}, unfinished(present)
    of_pods: dict[str, list[Lease]] = {}
    for lease in leases:
        of_pods.setdefault(pod_uid(lease), []).append(lease)
    actions: list[PodAction] = []
    for pod in pods:
        uid, namespace = str(pod["metadata"]["uid"]), pod["metadata"]["namespace"]
        if namespace not in own or pod["metadata"].get("deletionTimestamp") is not None:
            continue  # a Slice of a Pod that goes meanwhile would be deleted at once
        held = [lease for lease in of_pods.get(uid, []) if lease.request.namespace == namespace]
        live = [lease for lease in held if not lease.state.ended]
        wanted = live or sorted(held, key=lambda lease: lease.created_at)[-1:]
        for lease in wanted:
            one = slice_of(lease, pod)
            if not is_shown(shown.get(lease.id), one):
                actions.append(Show(slice_path(namespace, lease.id), one))
        kept = {lease.id for lease in wanted}
        # One that has ended stays while nothing follows it; one that the pool does not know any more does not.
        actions += [
            Hide(slice_path(namespace, name))
            for name, one in shown.items()
            if one["metadata"].get("labels", {}).get(POD_UID) == uid
            and name not in kept
            and (wanted or name in alive)
        ]
    return actions


def plan_servers(
    servers: Sequence[Mapping[str, Any]], present: Sequence[Mapping[str, Any]]
) -> list[PodAction]:
    """Return what is to be done for the GPUServers of the cluster to be those of the pool."""
    shown = {str(one["metadata"]["name"]): one for one in present}
    wanted = {one["metadata"]["name"]: one for one in map(server_of, servers)}
    return [
        *(
            Show(_server_path(name), one)
            for name, one in wanted.items()
            if not is_shown(shown.get(name), one)
        ),
        *(Hide(_server_path(name)) for name in shown if name not in wanted),
    ]


def unfinished(present: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the leases that Slices show as alive."""
    ended = {state.value for state in LeaseState if state.ended}
    return {
        str(one["metadata"]["name"]) for one in present if mapping(one, "status").get("state") not in ended
    }


def slice_path(namespace: str, name: str) -> str:
    """Return where the API server has a Slice."""
    return f"/apis/{API_VERSION}/namespaces/{namespace}/{SLICES}/{name}"


def _server_path(name: str) -> str:
    return f"/apis/{API_VERSION}/{SERVERS}/{name}"


def is_of_cluster(lease: Lease, cluster: str) -> bool:
    """Return whether the lease was requested with a token that this cluster's controller made."""
    return lease.request.owner == f"{lease.request.namespace}@{cluster}"


def is_of_account(lease: Lease, user_prefix: str | None) -> bool:
    """Return whether a ServiceAccount of the cluster requested the lease.

    ``user_prefix``: as :func:`plan_pods` has it.
    """
    start = f"{user_prefix}{_ACCOUNT}"
    if user_prefix is None or not lease.request.owner.startswith(start):
        return False
    namespace, _, account = lease.request.owner.removeprefix(start).partition(":")
    return bool(namespace and account)
