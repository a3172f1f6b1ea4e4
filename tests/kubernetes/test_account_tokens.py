"""Pods with no Secret: the pool accepts the tokens of their ServiceAccounts, by the cluster's own keys."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.client.requests import new_request
from jupyter_gpupool.core.errors import PermissionDenied, Unauthenticated, UnknownLease
from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.kubernetes.names import CONFIG_MAP, GPU, INJECT, SHARE_PERCENT, TOKEN, VOLUME

from .cluster import Cluster, needs_api_server
from .pods import ASKS, STUBBORN, WAIT, pod
from .running_controller import PREFIX, RunningController

pytestmark = needs_api_server

ISSUER = "https://kubernetes.default.svc"


@pytest.fixture(scope="module")
def open_pool(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster, whose pool accepts the tokens of two of its namespaces."""
    plane = cluster.plane
    keys_token = tmp_path_factory.mktemp("keys") / "token"
    issuer = {
        "issuer": ISSUER,
        "audience": "gpupool",
        "jwks_uri": f"{plane.url}/openid/v1/jwks",
        "ca_file": str(plane.ca),
        "keys_token_file": str(keys_token),
        "user_prefix": PREFIX,
        "max_age_s": None,
        "grants": [
            {"claims": {"kubernetes.io.namespace": name}, "namespace": name} for name in ("red", "blue")
        ],
    }
    for name in ("red", "blue", "grey"):
        plane.new_namespace(name)
        if name != "grey":
            cluster.administrator.create_namespace(name, {})
        made = cluster.server.token()["files"]
        data = {file: made[file] for file in ("ca.crt", "servers.conf")}
        metadata = {"name": CONFIG_MAP, "namespace": name}
        plane.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    # An account without any rights may read the keys.
    keys_token.write_text(token(cluster, "grey", ISSUER))
    cluster.server.stop()
    with (cluster.server.folder / "gpupool_config.py").open("a") as file:
        file.write(f"\nc.OIDC.issuers = [{issuer!r}]\n")
    cluster.server.start()
    return cluster


def token(cluster: Cluster, namespace: str, audience: str = "gpupool") -> str:
    """One of the account `default`, as the kubelet gets it for a Pod."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
    made = cluster.plane.api.post(path, json={"spec": {"audiences": [audience], "expirationSeconds": 3600}})
    made.raise_for_status()
    return str(made.json()["status"]["token"])


def client(cluster: Cluster, text: str) -> PoolClient:
    return cluster.server.client(text)


def test_a_pod_without_a_secret_runs_in_its_own_namespace(
    open_pool: Cluster, eventually: Callable[..., Any]
) -> None:
    asked = pod(
        {GPU: "1", SHARE_PERCENT: "50"}, labels={INJECT: "true"}, annotations={TOKEN: "account"}, command=WAIT
    )
    done = open_pool.plane.kubectl("create", "-n", "red", "-f", "-", given=[asked])
    assert done.returncode == 0, done.stderr
    (lease,) = eventually(
        lambda: [x for x in open_pool.leases() if x.state is LeaseState.ACTIVE], "the lease"
    )
    assert (lease.request.namespace, lease.request.owner) == (
        "red",
        f"{PREFIX}system:serviceaccount:red:default",
    )
    assert open_pool.plane.kubectl("get", "secret", "gpupool", "-n", "red").returncode == 1
    mine, theirs = (client(open_pool, token(open_pool, name)) for name in ("red", "blue"))
    assert [x.id for x in mine.leases()] == [lease.id]
    assert theirs.leases() == []
    with pytest.raises(UnknownLease):
        theirs.release(lease.id)
    request, _ = new_request(partial=0.1)
    with pytest.raises(PermissionDenied):
        theirs.request(replace(request, namespace="red"))
    open_pool.plane.kubectl("delete", "pod", "train", "-n", "red")
    assert open_pool.leases() == []


def expired(cluster: Cluster, text: str) -> str:
    """The same token, as the cluster would have signed it two hours ago."""
    header, claims = (
        json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in text.split(".")[:2]
    )
    for name in ("iat", "nbf", "exp"):
        claims[name] -= 2 * 3600
    return jwt.encode(header, claims, RSAKey.import_key(cluster.plane.account_key.read_bytes()))


def test_a_running_pod_whose_token_expires_keeps_its_lease_and_goes_on_with_the_next(
    open_pool: Cluster, eventually: Callable[..., Any]
) -> None:
    asked = pod(
        {GPU: "1", SHARE_PERCENT: "30"},
        labels={INJECT: "true"},
        annotations={TOKEN: "account"},
        command=["sh", "-c", ASKS],
    )
    asked["metadata"]["name"] = "asking"
    done = open_pool.plane.kubectl("create", "-n", "red", "-f", "-", given=[asked])
    assert done.returncode == 0, done.stderr

    def said(words: str) -> int:
        return open_pool.log("red", "asking").splitlines().count(words)

    eventually(lambda: said("answered"), "that the pool answers the Pod")
    (lease,) = open_pool.leases()
    held = open_pool.kubelet.mounted("red", "asking", VOLUME, "token")
    open_pool.kubelet.write("red", "asking", VOLUME, "token", expired(open_pool, held))
    eventually(lambda: said("refused"), "that the pool refuses it")
    assert [x.id for x in open_pool.leases()] == [lease.id]
    answered = said("answered")
    # What a kubelet does before the former one expires.
    open_pool.kubelet.write("red", "asking", VOLUME, "token", token(open_pool, "red"))
    eventually(lambda: said("answered") > answered, "further answers")
    assert [x.id for x in open_pool.leases()] == [lease.id]
    open_pool.plane.kubectl("delete", "pod", "asking", "-n", "red")
    eventually(lambda: not open_pool.leases(), "the end of the lease")


def test_a_token_for_somebody_else_is_refused(open_pool: Cluster) -> None:
    with pytest.raises(Unauthenticated, match="claim 'aud' is not what it must be"):
        client(open_pool, token(open_pool, "red", ISSUER)).whoami()
    head, body, signature = token(open_pool, "red").split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    claims["kubernetes.io"]["namespace"] = "blue"
    changed = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    with pytest.raises(Unauthenticated, match="its signature is not its issuer's"):
        client(open_pool, f"{head}.{changed}.{signature}").whoami()


def test_a_namespace_without_a_grant_gets_nothing(open_pool: Cluster) -> None:
    request, _ = new_request(partial=0.1)
    with pytest.raises(Unauthenticated, match="Token grants nothing"):
        client(open_pool, token(open_pool, "grey")).request(request)


def test_the_lease_of_a_pod_that_is_gone_is_released_although_its_program_runs(
    open_pool: Cluster, controller: RunningController, eventually: Callable[..., Any]
) -> None:
    """As on a node that the control plane has lost. The namespace needs no label for that."""
    asked = pod({GPU: "1"}, labels={INJECT: "true"}, annotations={TOKEN: "account"}, command=STUBBORN)
    asked["metadata"]["name"] = "lost"
    done = open_pool.plane.kubectl("create", "-n", "red", "-f", "-", given=[asked])
    assert done.returncode == 0, done.stderr
    (lease,) = eventually(
        lambda: [x for x in open_pool.leases() if x.state is LeaseState.ACTIVE], "the lease"
    )
    open_pool.kubelet.forget("red", "lost")
    open_pool.plane.kubectl("delete", "pod", "lost", "-n", "red", "--force", "--grace-period=0")
    eventually(lambda: not open_pool.leases(), "the end of the lease")
    assert open_pool.administrator.lease(lease.id).state is LeaseState.RELEASED
