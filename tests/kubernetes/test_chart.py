"""The Helm chart says what `gpupool kubernetes manifests` says."""

from __future__ import annotations

import base64
import datetime
import json
import ssl
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_gpupool.kubernetes.controller_manifests import controller_manifests
from jupyter_gpupool.kubernetes.farm_manifests import farm_manifests
from jupyter_gpupool.kubernetes.manifests import TLS, Options, dns_names, manifests
from jupyter_gpupool.kubernetes.pool_manifests import pool_manifests

from .chart import CHART, NAMESPACE, helm, rendered

PEM = {name: f"-----BEGIN {name}-----\n{name}\n" for name in ("ca", "certificate", "key")}
EVERYTHING: dict[str, Any] = {
    "image": "gpupool:1",
    "imagePullSecrets": [{"name": "registry"}],
    "webhook": {"gpuMemory": 32510, "accountTokens": True, "clientImage": "client:1"},
    "controller": {"userPrefix": "cluster-01:"},
    "pool": {
        "enabled": True,
        "gpus": 4,
        "storage": {"size": "2Gi", "className": "fast"},
        "nodeSelector": {"nvidia.com/gpu.present": "true"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "monitoring": {"namespace": "monitoring", "dashboard": True},
}
FARM = {**EVERYTHING["pool"], "farm": True, "database": {"secret": "gpupool-database", "key": "uri"}}
#: Of others, which have no schema among Kubernetes' own.
FOREIGN = ("ServiceMonitor",)

ADMISSIONS = ("webhook", "policy", "both")

words = st.from_regex(r"[a-z][a-z0-9-]{0,12}[a-z0-9]", fullmatch=True)


@st.composite
def charts_values(draw: st.DrawFn) -> dict[str, Any]:
    """Values of every feature that the manifests have, too."""
    webhook = {
        "gpuMemory": draw(st.none() | st.integers(1, 1 << 30)),
        "accountTokens": draw(st.booleans()),
        "clientImage": draw(st.just("") | words),
        **draw(st.sampled_from([{"tls": PEM}, {"issuer": "cluster-ca"}])),
    }
    minor = draw(st.integers(20, 40))
    farm = draw(st.booleans())
    secret = draw(st.just("") | words) if farm else ""
    prefix = st.none() | st.text("ab:/'\"{}#$ \\", max_size=12)
    return {
        "image": f"{draw(words)}:1",
        "admission": draw(st.sampled_from(ADMISSIONS if minor >= 34 else ADMISSIONS[:1])),
        "replicas": draw(st.integers(1, 100)),
        "kubernetesVersion": f"1.{minor}{draw(st.sampled_from(['', '.0', '.7']))}",
        "webhook": webhook,
        "controller": {"enabled": draw(st.booleans()), "userPrefix": draw(prefix)},
        "pool": {
            "enabled": draw(st.booleans()),
            "gpus": draw(st.integers(0, 1024)),
            "farm": farm,
            "database": {"secret": secret, "key": draw(words)},
        },
        "monitoring": {"namespace": draw(st.just("") | words)},
    }


def printed(values: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
    """What `gpupool kubernetes manifests` prints for these values."""
    webhook, pool = values["webhook"], values["pool"]
    tls = TLS(*(PEM[name].encode() for name in ("certificate", "key", "ca"))) if "tls" in webhook else None
    options = Options(
        image=values["image"],
        namespace=namespace,
        version=(1, int(values["kubernetesVersion"].split(".")[1])),
        replicas=values["replicas"],
        tls=tls,
        issuer=webhook.get("issuer", ""),
        gpu_memory_mib=webhook["gpuMemory"],
        account_tokens=webhook["accountTokens"],
        client_image=webhook["clientImage"],
        user_prefix=values["controller"]["userPrefix"],
        pool_gpus=pool["gpus"],
        monitoring_namespace=values["monitoring"]["namespace"],
        admission=values["admission"],
        farm=pool["farm"],
        database=(pool["database"]["secret"], pool["database"]["key"])
        if pool["database"]["secret"]
        else None,
    )
    objects = manifests(options)
    if values["controller"]["enabled"]:
        objects += controller_manifests(options)
    if pool["enabled"]:
        objects += farm_manifests(options) if pool["farm"] else pool_manifests(options)
    return objects


def by_name(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {f"{one['kind']} {one['metadata']['name']}": one for one in objects}
    assert len(found) == len(objects)
    return found


@given(charts_values(), words)
@settings(max_examples=40, deadline=None)
def test_the_chart_has_the_objects_of_the_manifests(values: dict[str, Any], namespace: str) -> None:
    wanted = by_name(printed(values, namespace))
    del wanted[f"Namespace {namespace}"]  # Helm makes it
    found = by_name(rendered(values, namespace))
    if "PersistentVolumeClaim gpupool" in wanted:
        # The claim outlives its release.
        kept = found["PersistentVolumeClaim gpupool"]["metadata"].pop("annotations")
        assert kept == {"helm.sh/resource-policy": "keep"}
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert one == wanted[name], name


@pytest.mark.parametrize("minor", range(27, 38))
@pytest.mark.parametrize(
    "pool", [EVERYTHING["pool"], FARM, {**FARM, "database": {}}], ids=["node", "two", "one"]
)
def test_the_objects_are_valid(minor: int, pool: dict[str, Any]) -> None:
    values = {**EVERYTHING, "pool": pool, "kubernetesVersion": f"1.{minor}"}
    values["admission"] = "both" if minor >= 34 else "webhook"
    found = rendered(values)
    for one in found:
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, f"1.{minor}", strict=True)
    assert len(found) == len(by_name(found))
    assert ("ValidatingAdmissionPolicy gpupool-controller" in by_name(found)) == (minor >= 30)


def test_helm_finds_nothing_to_complain_about() -> None:
    for values in ({"image": "gpupool:1"}, EVERYTHING, {**EVERYTHING, "pool": FARM}):
        report = helm.lint(CHART, values, strict=True, namespace=NAMESPACE)
        assert report["errors"] == []
        assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


def test_where_the_pool_runs_and_what_it_may_pull() -> None:
    found = by_name(rendered(EVERYTHING))
    for name in ("gpupool", "gpupool-webhook", "gpupool-controller"):
        pod = found[f"Deployment {name}"]["spec"]["template"]["spec"]
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
    pod = found["Deployment gpupool"]["spec"]["template"]["spec"]
    assert (pod["nodeSelector"], pod["tolerations"]) == (
        EVERYTHING["pool"]["nodeSelector"],
        EVERYTHING["pool"]["tolerations"],
    )
    claim = found["PersistentVolumeClaim gpupool"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]) == ("fast", {"storage": "2Gi"})


def test_where_a_farm_runs_and_what_its_servers_are_told() -> None:
    lines = "c.RayEngine.park_memory_mib = 1024\nc.PoolService.reclaim = 'idle'\n"
    found = by_name(rendered({**EVERYTHING, "pool": {**FARM, "settings": lines}}))
    server = found["DaemonSet gpupool-server"]["spec"]["template"]["spec"]
    assert (server["nodeSelector"], server["tolerations"]) == (FARM["nodeSelector"], FARM["tolerations"])
    pool = found["StatefulSet gpupool"]["spec"]["template"]["spec"]
    assert "nodeSelector" not in pool and "tolerations" not in pool
    assert server["imagePullSecrets"] == pool["imagePullSecrets"] == [{"name": "registry"}]
    assert found["ConfigMap gpupool"]["data"]["gpupool_config.py"].endswith(f'["DATABASE_URL"]\n{lines}')
    elsewhere = {**FARM, "nodeSelector": {"pool": "a100"}}
    server = by_name(rendered({**EVERYTHING, "pool": elsewhere}))["DaemonSet gpupool-server"]["spec"][
        "template"
    ]
    assert server["spec"]["nodeSelector"] == {"pool": "a100"}


def test_the_dashboard_is_that_of_the_documentation(project_root: Path) -> None:
    content = by_name(rendered(EVERYTHING))["ConfigMap gpupool-dashboard"]["data"]["gpupool.json"]
    assert json.loads(content) == json.loads((project_root / "docs" / "grafana.json").read_text())


def test_helm_certifies_the_webhook_where_nobody_else_does() -> None:
    found = by_name(rendered({"image": "gpupool:1"}, "gpus"))
    secret = found["Secret gpupool-webhook"]
    data = {name: base64.b64decode(content) for name, content in secret["data"].items()}
    webhook = found["MutatingWebhookConfiguration gpupool-webhook"]["webhooks"][0]
    assert base64.b64decode(webhook["clientConfig"]["caBundle"]) == data["ca.crt"]
    authority, served = (x509.load_pem_x509_certificate(data[name]) for name in ("ca.crt", "tls.crt"))
    served.verify_directly_issued_by(authority)
    names = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == dns_names("gpus")
    assert ssl.create_default_context(cadata=data["ca.crt"].decode()).cert_store_stats()["x509_ca"] == 1
    renew = datetime.datetime.fromtimestamp(
        int(secret["metadata"]["annotations"]["gpupool.io/renew-at"]), datetime.timezone.utc
    )
    assert served.not_valid_before_utc < renew < served.not_valid_after_utc


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "image"),
        ({"image": ""}, "/image"),
        ({"image": "a", "replica": 2}, "replica"),
        ({"image": "a", "replicas": 0}, "/replicas"),
        ({"image": "a", "pool": {"gpus": "4"}}, "/pool/gpus"),
        ({"image": "a", "pool": {"database": {"secret": "b"}}}, "/pool/database/secret"),
        (
            {"image": "a", "pool": {"farm": True, "database": {"secret": "b", "key": ""}}},
            "/pool/database/key",
        ),
        ({"image": "a", "pool": {"settings": "c.a.b = 1"}}, "/pool/settings"),
        ({"image": "a", "webhook": {"issuer": "a", "tls": PEM}}, "/webhook/tls"),
        ({"image": "a", "webhook": {"tls": {"ca": PEM["ca"]}}}, "/webhook/tls"),
        ({"image": "a", "admission": "policy", "kubernetesVersion": "1.33"}, "need Kubernetes 1.34"),
        ({"image": "a", "admission": "none"}, "/admission"),
        ({"image": "a", "kubernetesVersion": "2"}, "/kubernetesVersion"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(helm.HelmError) as refused:
        rendered(values)
    assert words in str(refused.value)
