"""What the controller does next: a pure function of what the cluster and the pool have."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest

from .names import LIMITS, MANAGED, RENEW_AT, SLICE, TOKEN_ID
from .pod_request import mapping, quantity, shown

#: For how long, in seconds, a token stays valid after it was replaced: so long may a Secret take to reach every Pod.
GRACE_S = 600.0

#: The limits of a pool's namespace that an annotation may set.
_WHOLE = ("memory_mib", "leases")
_NUMBERS = (*_WHOLE, "gpus", "user_share", "lease_s", "idle_s", "reclaim_after_s")


@dataclass(frozen=True)
class Cluster:
    """``id``: what tells this cluster from others. ``namespaces``: the labelled ones.

    ``secrets`` and ``quotas``: of these, by the namespace's name. ``nodes``: all.
    """

    id: str
    namespaces: Sequence[Mapping[str, Any]]
    secrets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quotas: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    nodes: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Pool:
    """``namespaces``: their limits by name. ``tokens``: all. ``gpus``: how many there are.

    ``descriptions``: of namespaces, by name.
    """

    namespaces: Mapping[str, Mapping[str, Any]]
    tokens: Sequence[Mapping[str, Any]]
    gpus: int
    descriptions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CreateNamespace:
    """Create a namespace of the pool, with the description by which it is known again."""

    name: str
    limits: Mapping[str, float]
    description: str


@dataclass(frozen=True)
class ChangeLimits:
    """Change limits of a namespace of the pool."""

    name: str
    limits: Mapping[str, float]


@dataclass(frozen=True)
class IssueToken:
    """Create a token, and put it into the namespace's Secret. ``replaces``: the token that it has now, or empty."""

    namespace: str
    description: str
    owner: str
    replaces: str = ""


@dataclass(frozen=True)
class RevokeToken:
    """Revoke a token; ``ends_leases``: also end its leases, unless that namespace exists after all."""

    id: str
    ends_leases: bool
    namespace: str = ""


@dataclass(frozen=True)
class OfferSlices:
    """Let a node take Pods that ask for so many slices in all."""

    node: str
    count: int


@dataclass(frozen=True)
class Complain:
    """Tell the administrator what is wrong with a namespace."""

    namespace: str
    message: str


@dataclass(frozen=True)
class PublishAddresses:
    """Write the ConfigMap by which Pods that use the tokens of their accounts find the pool."""

    namespace: str


Action = CreateNamespace | ChangeLimits | IssueToken | RevokeToken | OfferSlices | Complain | PublishAddresses


def description(cluster: str, namespace: str) -> str:
    """Return what the tokens of a cluster's namespace, and its namespace of the pool, are known again by."""
    return f"Kubernetes {cluster} namespace {namespace}"


def plan(cluster: Cluster, pool: Pool, now: float, adopted: Collection[str] = ()) -> list[Action]:
    """Return what is to be done now. Where everything is as it should be, that is nothing.

    ``adopted``: namespaces of the pool that the cluster gets although others made them.
    """
    actions: list[Action] = []
    for namespace in cluster.namespaces:
        if mapping(namespace, "metadata").get("deletionTimestamp") is None:
            name = str(namespace["metadata"]["name"])
            if name in pool.namespaces and not is_own(cluster, pool, name, adopted):
                actions.append(
                    Complain(
                        name,
                        f"the pool has a namespace {name!r} that this cluster did not make; to give it to the cluster, "
                        f"start the controller with --adopt {name}",
                    )
                )
                continue
            actions += _limits(cluster, pool, namespace, name)
            actions += _tokens(cluster, pool, name, now)
    for node in cluster.nodes:
        offered = mapping(mapping(node, "status"), "capacity").get(SLICE)
        count = pool.gpus * 100
        if not _is_so_many(offered, count):
            actions.append(OfferSlices(str(node["metadata"]["name"]), count))
    alive = {description(cluster.id, str(n["metadata"]["name"])) for n in cluster.namespaces}
    ours = description(cluster.id, "")
    for token in pool.tokens:
        text = str(token["description"])
        if token["state"] == "valid" and text.startswith(ours) and text not in alive:
            actions.append(RevokeToken(str(token["id"]), True, text.removeprefix(ours)))
    return actions


def plan_addresses(
    own: Collection[str], present: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]
) -> list[Action]:
    """Return which namespaces' ConfigMaps are to be written. One that somebody made by hand stays as it is."""
    found = {str(one["metadata"]["namespace"]): one for one in present}
    return [
        PublishAddresses(name)
        for name in sorted(own)
        if name not in found
        or (MANAGED in mapping(found[name]["metadata"], "labels") and mapping(found[name], "data") != wanted)
    ]


def own_namespaces(cluster: Cluster, pool: Pool, adopted: Collection[str] = ()) -> set[str]:
    """Return the labelled namespaces whose counterparts in the pool are this cluster's."""
    names = {str(namespace["metadata"]["name"]) for namespace in cluster.namespaces}
    return {name for name in names if name in pool.namespaces and is_own(cluster, pool, name, adopted)}


def is_own(cluster: Cluster, pool: Pool, name: str, adopted: Collection[str] = ()) -> bool:
    """Return whether a namespace of the pool is this cluster's: it was adopted, or the cluster made it, as its
    description says, or a token of it, ever."""
    if name in adopted:
        return True
    text = description(cluster.id, name)
    return pool.descriptions.get(name) == text or any(token["description"] == text for token in pool.tokens)


def _is_so_many(offered: Any, count: int) -> bool:
    """Return whether a quantity is this number, however the API server writes it: 1000 becomes 1k."""
    try:
        return offered is not None and quantity(SLICE, offered) == count
    except InvalidRequest:  # somebody else has written it
        return False


def limits_of(namespace: Mapping[str, Any], quotas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the limits that the annotation gives, else the smallest ResourceQuota's. Raises InvalidRequest."""
    text = mapping(mapping(namespace, "metadata"), "annotations").get(LIMITS)
    if text is None:
        hard = [mapping(mapping(quota, "spec"), "hard").get(f"requests.{SLICE}") for quota in quotas]
        slices = [quantity(SLICE, value) for value in hard if value is not None]
        smallest = min(slices, default=0)
        return {"gpus": smallest / 100} if smallest else {}
    limits: dict[str, float] = {}
    for pair in filter(None, (part.strip() for part in str(text).split(","))):
        name, _, value = pair.partition("=")
        try:
            number = int(value) if name in _WHOLE else float(value)
            if name not in _NUMBERS or not 0 < number < float("inf"):
                raise ValueError
        except ValueError:
            raise InvalidRequest(
                f"the annotation {LIMITS} must be written as gpus=4,leases=10, of {', '.join(_NUMBERS)}; "
                f"{shown(pair)} is not"
            ) from None
        limits[name] = number
    return limits


def _limits(cluster: Cluster, pool: Pool, namespace: Mapping[str, Any], name: str) -> list[Action]:
    text = description(cluster.id, name)
    try:
        wanted = limits_of(namespace, cluster.quotas.get(name, ()))
    except InvalidRequest as e:
        return [
            Complain(name, str(e)),
            *([] if name in pool.namespaces else [CreateNamespace(name, {}, text)]),
        ]
    if name not in pool.namespaces:
        return [CreateNamespace(name, wanted, text)]
    # What nobody wrote down here is left to the pool's administrators.
    different = {limit: value for limit, value in wanted.items() if pool.namespaces[name].get(limit) != value}
    return [ChangeLimits(name, different)] if different else []


def _tokens(cluster: Cluster, pool: Pool, name: str, now: float) -> list[Action]:
    """Return what is to be done for the namespace's Secret, and about the tokens that it had before."""
    text = description(cluster.id, name)
    valid = {str(t["id"]): t for t in pool.tokens if t["description"] == text and t["state"] == "valid"}
    secret = cluster.secrets.get(name)
    annotations = mapping(mapping(secret or {}, "metadata"), "annotations")
    if secret is not None and TOKEN_ID not in annotations:
        return []  # somebody gives the namespace a bundle by hand
    current = valid.get(str(annotations.get(TOKEN_ID)))
    if current is None or now >= _number(annotations.get(RENEW_AT)):
        # A lease belongs to its token's owner, so all tokens of a namespace have the same one.
        replaces = str(annotations.get(TOKEN_ID, ""))
        return [IssueToken(name, text, f"{name}@{cluster.id}", replaces)]
    if now < float(current["created_at"]) + GRACE_S:
        return []
    return [RevokeToken(token, False) for token in valid if token != current["id"]]


def _number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return 0.0
