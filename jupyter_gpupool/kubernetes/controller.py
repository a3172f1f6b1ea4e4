"""The controller: keeps the cluster and the pool in step, whenever either changes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import PoolError, UnknownLease
from jupyter_gpupool.core.models import Lease, Scope

from .api_server import APIServer
from .names import CONFIG_MAP, DEFAULT_SECRET, MANAGED, RENEW_AT, SLICE, TOKEN_ID
from .plan import (
    Action,
    ChangeLimits,
    Cluster,
    Complain,
    CreateNamespace,
    IssueToken,
    OfferSlices,
    Pool,
    PublishAddresses,
    RevokeToken,
    own_namespaces,
    plan,
    plan_addresses,
)
from .pod_leases import (
    Hide,
    PodAction,
    ReleaseLease,
    Show,
    TellPod,
    is_over,
    plan_pods,
    plan_servers,
    plan_slices,
    pod_uid,
    unfinished,
)
from .pod_request import mapping
from .watching import NotListedYet

#: How long the token of a namespace is valid, in seconds; it is replaced after two thirds of that.
TOKEN_LIFE_S = 30 * 86400.0
#: The shortest time between two rounds, in seconds: changes within it are seen together.
_SPACING_S = 0.2
#: How soon, in seconds, what failed is tried again.
_RETRY_S = 2.0
#: How long a Pod that is not watched counts as alive once it was seen: all Pods of the cluster are listed for it.
_ALIVE_S = 60.0

logger = logging.getLogger(__name__)


class Objects(Protocol):
    """The objects of the cluster, by the names of :data:`.watching.KINDS`."""

    def objects(self, kind: str) -> list[dict[str, Any]]:
        """Return the objects of a kind as they were seen last. Raises NotListedYet."""


class Controller:
    """Keeps nothing that it needs: whatever it missed while it was down, the next round shows.

    ``leads``: whether this process may act. What it knows of the leases of a moment ago only makes Events richer.
    """

    def __init__(
        self,
        api: APIServer,
        pool: PoolClient,
        cluster: Objects,
        leads: Callable[[], bool] = lambda: True,
        token_life_s: float = TOKEN_LIFE_S,
        adopted: Collection[str] = (),
        addresses: Mapping[str, str] | None = None,
        user_prefix: str | None = None,
    ) -> None:
        """``addresses``: the files of a bundle without a token, which each namespace gets as a ConfigMap.

        ``user_prefix``: what precedes the names of the cluster's ServiceAccounts in the pool; None: it is not known.
        """
        self._api, self._pool, self._objects, self._leads = api, pool, cluster, leads
        self._life_s = token_life_s
        self._adopted, self._addresses, self._user_prefix = adopted, addresses, user_prefix
        self._complaints: set[Complain] = set()
        self._leases: dict[str, Lease] = {}  # of Pods, that lived in the round before
        self._told: dict[str, str] = {}  # Event → its message
        self._seen_alive: dict[
            str, float
        ] = {}  # uids of Pods that are not watched → until when they count as alive
        self._examined: set[str] = set()  # uids of Pods that are over, whose ended leases were looked for
        self._cluster_id = ""
        self._failed = False

    def run(self, interval_s: float, changed: threading.Event, stop: threading.Event) -> None:
        """Reconcile whenever ``changed`` is set, and every ``interval_s``.

        To end it, set ``stop``, then ``changed``.
        """
        while not stop.is_set():
            changed.clear()
            wait_s = interval_s
            if self._leads():
                try:
                    self.reconcile()
                    if self._failed:
                        wait_s = min(interval_s, _RETRY_S)
                except NotListedYet as e:
                    logger.info("%s", e)
                except PoolError as e:
                    wait_s = min(interval_s, _RETRY_S)
                    logger.error("%s; trying again in %g s", e, wait_s)
            if not stop.wait(_SPACING_S):
                changed.wait(wait_s)

    def reconcile(self) -> list[Action | PodAction]:
        """Do what is to be done now, and return it. Raises PoolError where either side cannot be seen."""
        now = time.time()
        # The pool first: a lease that it has is of a Pod that exists by then.
        servers, leases = self._pool.pool()["servers"], self._pool.leases()
        pool = self._pool_now(servers)
        cluster = self._cluster()
        pods, slices = self._objects.objects("pods"), self._objects.objects("slices")
        own = own_namespaces(cluster, pool, self._adopted)
        ended = self._ended(leases, pods, slices, own)
        actions: list[Action | PodAction] = [*plan(cluster, pool, now, self._adopted)]
        if self._addresses is not None:
            actions += plan_addresses(own, self._objects.objects("addresses"), self._addresses)
        actions += plan_pods([*leases, *ended], self._leases, pods, own, cluster.id, now, self._user_prefix)
        actions += plan_slices([*leases, *ended], slices, pods, own)
        actions += plan_servers(servers, self._objects.objects("servers"))
        actions = [one for one in actions if not self._is_told(one)]
        self._carry_out(actions)
        self._complaints = {action for action in actions if isinstance(action, Complain)}
        self._leases = {lease.id: lease for lease in leases if pod_uid(lease)}
        return actions

    def _carry_out(self, actions: Collection[Action | PodAction]) -> None:
        not_made: set[str] = set()
        self._failed = False
        for action in actions:
            if not self._leads():
                return
            if isinstance(action, IssueToken) and action.namespace in not_made:
                continue  # somebody else may have made a namespace of that name just now
            try:
                self._act(action)
            except PoolError as e:
                self._failed = True
                logger.error("%s: %s", type(action).__name__, e)
                if isinstance(action, CreateNamespace):
                    not_made.add(action.name)

    def _cluster(self) -> Cluster:
        namespaces = self._objects.objects("namespaces")
        names = {namespace["metadata"]["name"] for namespace in namespaces}
        secrets = self._objects.objects("secrets")
        quotas = self._objects.objects("quotas")
        return Cluster(
            self._id(),
            namespaces,
            {one["metadata"]["namespace"]: one for one in secrets if one["metadata"]["namespace"] in names},
            {name: [quota for quota in quotas if quota["metadata"]["namespace"] == name] for name in names},
            self._objects.objects("nodes"),
        )

    def _id(self) -> str:
        if not self._cluster_id:
            system = self._api.find("/api/v1/namespaces/kube-system")
            if system is None:
                raise PoolError("the cluster has no namespace kube-system, by whose uid it is known")
            self._cluster_id = system["metadata"]["uid"][:8]
        return self._cluster_id

    def _pool_now(self, servers: Collection[dict[str, Any]]) -> Pool:
        namespaces = self._pool.namespaces()
        return Pool(
            {namespace["name"]: namespace["limits"] for namespace in namespaces},
            self._pool.tokens(),
            sum(len(server["gpus"]) for server in servers),
            {namespace["name"]: namespace["description"] for namespace in namespaces},
        )

    def _ended(
        self,
        live: Collection[Lease],
        pods: Collection[dict[str, Any]],
        slices: Sequence[dict[str, Any]],
        own: Collection[str],
    ) -> list[Lease]:
        """Return the Pods' leases that lived when they were seen last, and those that came and went unseen."""
        here = {lease.id for lease in live}
        ended: dict[str, Lease] = {}
        for lease_id in (self._leases.keys() | unfinished(slices)) - here:
            with contextlib.suppress(UnknownLease):
                ended[lease_id] = self._pool.lease(lease_id)
        uids = {str(pod["metadata"]["uid"]) for pod in pods}
        over = {str(p["metadata"]["uid"]) for p in pods if is_over(p) and p["metadata"]["namespace"] in own}
        if over - self._examined:
            for lease in self._pool.leases(include_ended=True):
                if lease.state.ended and pod_uid(lease) in over - self._examined:
                    ended[lease.id] = lease
        self._examined = (self._examined & uids) | over
        return list(ended.values())

    def _is_told(self, action: Action | PodAction) -> bool:
        return isinstance(action, TellPod) and self._told.get(action.event.name) == action.event.message

    def _act(self, action: Action | PodAction) -> None:
        if isinstance(action, Complain):
            if action not in self._complaints:  # else the log has it already
                logger.warning("%s", action.message, extra={"namespace": action.namespace})
            return
        if isinstance(action, CreateNamespace):
            fields = {"limits": dict(action.limits), "description": action.description}
            self._pool.create_namespace(action.name, fields)
        elif isinstance(action, ChangeLimits):
            self._pool.change_namespace(action.name, {"limits": dict(action.limits)})
        elif isinstance(action, IssueToken):
            self._issue(action)
        elif isinstance(action, RevokeToken):
            if action.ends_leases and self._is_managed(action.namespace):
                return  # it has just been created, and will be seen in the next round
            self._pool.revoke_token(action.id, action.ends_leases)
        elif isinstance(action, OfferSlices):
            offered = {SLICE: str(action.count)}
            status = {"capacity": offered, "allocatable": offered}
            self._api.merge(f"/api/v1/nodes/{action.node}/status", {"status": status})
        elif isinstance(action, PublishAddresses):
            self._publish(action.namespace)
        elif isinstance(action, TellPod):
            event = action.event
            self._api.apply(f"/api/v1/namespaces/{event.namespace}/events/{event.name}", event.to_json())
            self._remember(event.name, event.message)
            return
        elif isinstance(action, Show):
            self._api.apply(action.path, dict(action.wanted))
            return
        elif isinstance(action, Hide):
            self._api.delete(action.path)
            return
        elif isinstance(action, ReleaseLease):
            if self._seen_alive.get(action.pod_uid, 0.0) > time.monotonic():
                return
            where = f"namespaces/{action.namespace}/" if action.namespace else ""
            pods = self._api.list(f"/api/v1/{where}pods")
            if any(str(pod["metadata"]["uid"]) == action.pod_uid and not is_over(pod) for pod in pods):
                if not action.namespace:  # it may have no label, and is not watched then
                    self._seen_alive[action.pod_uid] = time.monotonic() + _ALIVE_S
                return  # it is there: what is watched lags behind
            self._seen_alive.pop(action.pod_uid, None)
            self._pool.release(action.id)
        logger.info("%s", action)

    def _publish(self, namespace: str) -> None:
        metadata = {"name": CONFIG_MAP, "namespace": namespace, "labels": {MANAGED: "true"}}
        wanted = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": self._addresses}
        self._api.apply(f"/api/v1/namespaces/{namespace}/configmaps/{CONFIG_MAP}", wanted)

    def _remember(self, event: str, message: str) -> None:
        self._told.pop(event, None)
        self._told[event] = message
        if len(self._told) > 20_000:  # to write one of them once more does no harm
            del self._told[next(iter(self._told))]

    def _is_managed(self, namespace: str) -> bool:
        found = self._api.find(f"/api/v1/namespaces/{namespace}")
        return found is not None and mapping(mapping(found, "metadata"), "labels").get(MANAGED) == "true"

    def _issue(self, action: IssueToken) -> None:
        present = self._api.find(_secret(action.namespace))
        annotations = mapping(mapping(present or {}, "metadata"), "annotations")
        if annotations.get(TOKEN_ID, "") != action.replaces or (present and TOKEN_ID not in annotations):
            return  # it has been replaced already, and what is watched lags behind
        made = self._pool.create_token(
            action.description,
            self._life_s,
            owner=action.owner,
            namespace=action.namespace,
            scope=Scope.LEASE.value,
            one_namespace=True,
        )
        metadata = {
            "name": DEFAULT_SECRET,
            "namespace": action.namespace,
            "annotations": {TOKEN_ID: made["id"], RENEW_AT: f"{time.time() + self._life_s * 2 / 3:.0f}"},
        }
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": made["files"]}
        try:
            self._api.apply(_secret(action.namespace), secret)
        except PoolError:
            with contextlib.suppress(PoolError):  # the next round finds it
                self._pool.revoke_token(made["id"])
            raise


def _secret(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/secrets/{DEFAULT_SECRET}"
