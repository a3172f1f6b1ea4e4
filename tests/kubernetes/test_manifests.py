"""What `gpupool kubernetes manifests` prints."""

from __future__ import annotations

import base64
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cryptography import x509
from traitlets.config import Config

from jupyter_gpupool.kubernetes import certificate
from jupyter_gpupool.kubernetes.certificate import kept_certificate
from jupyter_gpupool.kubernetes.manifests import dns_names
from jupyter_gpupool.kubernetes.names import INJECT

VERSIONS = ("1.28", "1.37")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jupyter_gpupool", "kubernetes", "manifests", "--image", "gpupool:1"]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def printed(*options: str) -> list[dict[str, Any]]:
    done = run(*options)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The webhook's object of that kind."""
    ours = [m for m in manifests if not m["metadata"]["name"].startswith("gpupool-controller")]
    (found,) = [m for m in ours if m["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls") / "new"


@pytest.fixture(scope="module")
def manifests(folder: Path) -> list[dict[str, Any]]:
    return printed("--tls", str(folder), "--gpu-memory", "32510", "--controller")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_valid(manifests: list[dict[str, Any]], version: str) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_names_of_the_objects_agree(manifests: list[dict[str, Any]]) -> None:
    pod = of(manifests, "Deployment")["spec"]["template"]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = of(manifests, kind)["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        assert selector.get("matchLabels", selector) == pod["metadata"]["labels"], kind
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert of(manifests, "Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    assert pod["spec"]["volumes"][0]["secret"]["secretName"] == of(manifests, "Secret")["metadata"]["name"]
    assert pod["spec"]["serviceAccountName"] == of(manifests, "ServiceAccount")["metadata"]["name"]
    webhook = of(manifests, "MutatingWebhookConfiguration")["webhooks"][0]
    service = webhook["clientConfig"]["service"]
    assert f"{service['name']}.{service['namespace']}.svc" in dns_names(service["namespace"])
    assert container["command"][-4:] == ["--gpu-memory", "32510", "--client-image", "gpupool:1"]


def test_it_stands_in_no_other_pods_way(manifests: list[dict[str, Any]]) -> None:
    (webhook,) = of(manifests, "MutatingWebhookConfiguration")["webhooks"]
    assert (webhook["timeoutSeconds"], webhook["sideEffects"]) == (5, "None")
    (condition,) = webhook["matchConditions"]
    assert INJECT in condition["expression"]
    (names,) = webhook["namespaceSelector"]["matchExpressions"]
    assert (names["operator"], set(names["values"])) == ("NotIn", {"gpupool-system", "kube-system"})
    assert (
        of(manifests, "PodDisruptionBudget")["spec"]["minAvailable"]
        < of(manifests, "Deployment")["spec"]["replicas"]
    )


def test_the_webhook_has_no_rights(manifests: list[dict[str, Any]]) -> None:
    bindings = [m for m in manifests if m["kind"] == "ClusterRoleBinding"]
    account = of(manifests, "ServiceAccount")["metadata"]["name"]
    assert [s["name"] for b in bindings for s in b["subjects"]] == ["gpupool-controller"]
    assert account != "gpupool-controller"
    assert of(manifests, "ServiceAccount")["automountServiceAccountToken"] is False
    assert of(manifests, "NetworkPolicy")["spec"]["egress"] == []


def test_older_api_servers_get_a_selector_by_label(folder: Path) -> None:
    found = printed("--tls", str(folder), "--kubernetes", "v1.20.2")
    (webhook,) = of(found, "MutatingWebhookConfiguration")["webhooks"]
    assert "matchConditions" not in webhook
    assert webhook["objectSelector"] == {"matchLabels": {INJECT: "true"}}
    assert of(found, "PodDisruptionBudget")["apiVersion"] == "policy/v1beta1"


def test_from_1_30_on_the_controller_may_create_only_its_own_secrets(tmp_path: Path) -> None:
    found = printed(
        "--tls", str(tmp_path / "tls"), "--kubernetes", "1.30", "--controller", "--namespace", "gpus"
    )
    policy, binding = (m for m in found if m["kind"].startswith("ValidatingAdmissionPolicy"))
    for manifest in (policy, binding):
        kubernetes_validate.validate(manifest, "1.30", strict=True)
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
    (account,) = [m for m in found if m["kind"] == "ServiceAccount" and "controller" in m["metadata"]["name"]]
    user = f"system:serviceaccount:gpus:{account['metadata']['name']}"
    assert policy["spec"]["matchConditions"][0]["expression"] == f"request.userInfo.username == '{user}'"
    assert policy["spec"]["matchConstraints"]["resourceRules"][0]["operations"] == ["CREATE"]


@pytest.mark.parametrize("farm", [(), ("--farm", "--database", "db")], ids=["node", "farm"])
def test_a_kustomize_base_holds_what_is_printed(folder: Path, tmp_path: Path, farm: tuple[str, ...]) -> None:
    options = ("--tls", str(folder), "--controller", "--pool", "2", "--service-monitor", "monitoring", *farm)
    for _ in range(2):  # also over a former one
        done = run(*options, "--output", str(tmp_path / "base"))
        assert done.returncode == 0, done.stderr
    kustomization = yaml.safe_load((tmp_path / "base" / "kustomization.yaml").read_text())
    files = [tmp_path / "base" / name for name in kustomization["resources"]]
    assert [yaml.safe_load(file.read_text()) for file in files] == printed(*options)
    assert sorted(done.stdout.split()[1::2]) == sorted(map(str, (tmp_path / "base").iterdir()))
    secrets = [file for file in files if file.name.startswith("secret-")]
    assert secrets and all(file.stat().st_mode & 0o077 == 0 for file in secrets)


@pytest.mark.parametrize(("gpus", "emulates"), [("4", "--LocalEngine.emulate=never"), ("0", "--emulate")])
def test_a_pool_within_the_cluster_and_who_reads_its_metrics(folder: Path, gpus: str, emulates: str) -> None:
    found = {
        one["kind"]: one
        for one in printed("--tls", str(folder), "--pool", gpus, "--service-monitor", "observability")
        if one["metadata"]["name"] == "gpupool"
    }
    for kind, one in found.items():
        for version in VERSIONS:
            if kind != "ServiceMonitor":
                kubernetes_validate.validate(one, version, strict=True)
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    labels, service = pod["metadata"]["labels"], found["Service"]
    assert service["spec"]["selector"] == labels
    assert {p["targetPort"]: p["port"] for p in service["spec"]["ports"]} == ports
    monitor = found["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert [e["port"] for e in monitor["endpoints"]] == ["metrics"]
    everybody, prometheus = found["NetworkPolicy"]["spec"]["ingress"]
    assert "from" not in everybody and [p["port"] for p in everybody["ports"]] == ["control", "data"]
    assert [p["port"] for p in prometheus["ports"]] == ["metrics"]
    assert "observability" in str(prometheus["from"])
    assert f"--GPUPoolDaemon.metrics_address=0.0.0.0:{ports['metrics']}" in container["command"]
    assert emulates in container["command"]
    limits = container["resources"].get("limits", {})
    assert limits.get("nvidia.com/gpu") == (gpus if gpus != "0" else None)
    (claim,) = [v for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert claim["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]


def test_without_a_prometheus_nobody_reads_the_metrics_of_a_pool_within_the_cluster(folder: Path) -> None:
    found = printed("--tls", str(folder), "--pool", "1")
    assert not [one for one in found if one["kind"] == "ServiceMonitor"]
    (policy,) = [
        one for one in found if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "gpupool"
    ]
    assert "metrics" not in str(policy["spec"])


def farm_of(folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    found = printed("--tls", str(folder), "--farm", *options)
    names = [one for one in found if one["metadata"]["name"] in ("gpupool", "gpupool-pool", "gpupool-ray")]
    servers = [one for one in found if one["metadata"]["name"] == "gpupool-server"]
    return {f"{one['kind']} {one['metadata']['name']}": one for one in [*names, *servers]}


@pytest.mark.parametrize("database", [(), ("--database", "db/uri")], ids=["claim", "postgresql"])
@pytest.mark.parametrize("gpus", ["0", "4"])
def test_a_farm_within_the_cluster(folder: Path, gpus: str, database: tuple[str, ...]) -> None:
    found = farm_of(folder, "--pool", gpus, *database)
    for one in found.values():
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)
    programs = {
        "gpupool": found["StatefulSet gpupool"],
        "gpupool-ray": found["StatefulSet gpupool-ray"],
        "gpupool-server": found["DaemonSet gpupool-server"],
    }
    for name, program in programs.items():
        template = program["spec"]["template"]
        policy = found[f"NetworkPolicy {name}"]["spec"]
        assert policy["podSelector"]["matchLabels"] == template["metadata"]["labels"]
        members, *others = policy["ingress"]
        (peer,) = members["from"]
        (expression,) = peer["podSelector"]["matchExpressions"]
        assert "ports" not in members and expression["values"] == list(programs)
        # Whoever reaches Ray may run anything there.
        allowed = {port["port"] for rule in others for port in rule["ports"]}
        assert allowed == {"gpupool": {"control"}, "gpupool-ray": set(), "gpupool-server": {"data"}}[name]
        (container,) = template["spec"]["containers"]
        assert "authority" not in [mount["name"] for mount in container["volumeMounts"]]
        (token,) = [v["secret"]["items"] for v in template["spec"]["volumes"] if v["name"] == "ray"]
        assert token == [{"key": "ray.token", "path": "token"}]
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert (environment["RAY_AUTH_MODE"], "RAY_AUTH_TOKEN" in environment) == ("token", False)
    server = programs["gpupool-server"]["spec"]["template"]["spec"]
    assert f"--num-gpus={gpus if gpus != '0' else 2}" in server["containers"][0]["command"]
    limits = server["containers"][0]["resources"].get("limits", {})
    assert limits.get("nvidia.com/gpu") == (gpus if gpus != "0" else None)
    assert server.get("nodeSelector") == ({"nvidia.com/gpu.present": "true"} if gpus != "0" else None)
    assert ("PersistentVolumeClaim gpupool" in found) == (not database)
    assert programs["gpupool"]["spec"]["replicas"] == (2 if database else 1)


def test_servers_of_a_farm_know_their_names_and_their_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = farm_of(tmp_path / "tls", "--pool", "4", "--database", "db/uri", "--namespace", "gpus")
    pool, service = found["StatefulSet gpupool"], found["Service gpupool-pool"]
    assert pool["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    names = [f"gpupool-{n}.gpupool-pool.gpus.svc" for n in range(pool["spec"]["replicas"])]
    monkeypatch.setenv("DATABASE_URL", "postgresql://gpupool@db/gpupool")
    for n in range(2):
        monkeypatch.setenv("POD_NAME", f"gpupool-{n}")
        c = Config()
        exec(found["ConfigMap gpupool"]["data"]["gpupool_config.py"], {"get_config": lambda c=c: c})
        # By the first one it is known to the other one.
        assert c.GPUPoolDaemon.addresses == [names[n], names[1 - n]]
        assert (c.PoolService.engine_name, c.PoolService.db_url) == ("ray", "postgresql://gpupool@db/gpupool")
    for container in (pool["spec"]["template"]["spec"][key][0] for key in ("initContainers", "containers")):
        (source,) = [v["valueFrom"] for v in container["env"] if v["name"] == "DATABASE_URL"]
        assert source == {"secretKeyRef": {"name": "db", "key": "uri"}}


def test_policies_in_place_of_the_webhook() -> None:
    found = printed("--admission", "policy", "--kubernetes", "1.36", "--gpu-memory", "32510")
    assert not [one for one in found if one["kind"] in ("Deployment", "MutatingWebhookConfiguration")]
    variables = of(found, "MutatingAdmissionPolicy")["spec"]["variables"]
    assert {"name": "gpuMemory", "expression": "32510"} in variables
    both = printed("--admission", "both", "--kubernetes", "1.36", "--issuer", "ca")
    assert {"MutatingAdmissionPolicy", "MutatingWebhookConfiguration"} <= {one["kind"] for one in both}


def test_cert_manager_can_certify_it() -> None:
    found = printed("--issuer", "cluster-ca", "--namespace", "gpus")
    certificate = of(found, "Certificate")
    assert certificate["spec"]["dnsNames"] == dns_names("gpus")
    configuration = of(found, "MutatingWebhookConfiguration")
    name = f"gpus/{certificate['metadata']['name']}"
    assert configuration["metadata"]["annotations"] == {"cert-manager.io/inject-ca-from": name}
    assert "caBundle" not in configuration["webhooks"][0]["clientConfig"]


def test_the_certificate_is_what_the_configuration_trusts(
    folder: Path, manifests: list[dict[str, Any]]
) -> None:
    webhook = of(manifests, "MutatingWebhookConfiguration")["webhooks"][0]
    trust = ssl.create_default_context(cadata=base64.b64decode(webhook["clientConfig"]["caBundle"]).decode())
    assert trust.cert_store_stats()["x509_ca"] == 1
    served = base64.b64decode(of(manifests, "Secret")["data"]["tls.crt"])
    names = x509.load_pem_x509_certificate(served).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == dns_names("gpupool-system")
    assert printed("--tls", str(folder), "--gpu-memory", "32510", "--controller") == manifests
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}


def test_a_certificate_is_renewed_by_the_same_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, ca = kept_certificate(tmp_path, ["a.svc"])
    assert kept_certificate(tmp_path, ["a.svc"]) == (first, ca)
    other, same = kept_certificate(tmp_path, ["b.svc"])
    assert (other != first, same) == (True, ca)
    now = certificate.time.time()
    monkeypatch.setattr(certificate.time, "time", lambda: now + 86400 * certificate.SERVER_DAYS * 0.7)
    renewed, same = kept_certificate(tmp_path, ["b.svc"])
    assert (renewed != other, same) == (True, ca)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "who certifies the webhook?"),
        (["--issuer", "a", "--tls", "b"], "who certifies the webhook?"),
        (["--issuer", "a", "--admission", "policy", "--kubernetes", "1.36"], "nothing to certify"),
        (["--issuer", "a", "--admission", "both", "--kubernetes", "1.33"], "policies need Kubernetes 1.34"),
        (["--admission", "both", "--kubernetes", "1.36"], "who certifies the webhook?"),
        (["--issuer", "a", "--kubernetes", "2"], "a version of Kubernetes is written as 1.30"),
        (["--issuer", "a", "--replicas", "0"], "from 1 to 100"),
        (["--issuer", "a", "--service-monitor", "m"], "add --pool GPUS"),
        (["--issuer", "a", "--farm"], "add --pool GPUS"),
        (["--issuer", "a", "--pool", "1", "--database", "a"], "add --farm"),
        (["--issuer", "a", "--pool", "1", "--farm", "--database", "A/b"], "NAME or NAME/KEY, not 'A/b'"),
        (["--issuer", "a", "--output", "/dev/null/x"], "the manifests cannot be written to /dev/null/x"),
        (["--tls", "/dev/null/x"], "cannot be used for certificates"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], words: str) -> None:
    done = run(*options)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
