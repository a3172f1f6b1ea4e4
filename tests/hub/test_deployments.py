"""The deployments in docs/deployments, as far as they can be tried without the machines they are for."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_asyncio.client import ApiClient
from tornado.web import HTTPError
from traitlets.config import Config

from jupyter_gpupool.client import pool_finder
from jupyter_gpupool.hub import spawner_hooks
from jupyter_gpupool.hub.options import GPUOptions
from jupyter_gpupool.hub.service.app import GPUPoolHubService
from jupyter_gpupool.hub.service_client import Service

#: The oldest and the newest Kubernetes that the chart and the schemas know.
VERSIONS = ("1.28", "1.37")

#: Reads a configuration as the hub does, up to where it would start to listen.
LOAD = """\
import asyncio, json, sys
from jupyterhub.app import JupyterHub
app = JupyterHub()
asyncio.run(app.initialize(["-f", sys.argv[1], "--JupyterHub.db_url=sqlite://"]))
service = app._service_map["gpupool"]
print(json.dumps({
    "managed": service.managed, "url": service.url, "command": list(service.command),
    "scopes": sorted(s for r in app.load_roles for s in r["scopes"] if "gpupool" in s),
    "spawner": app.spawner_class.__name__,
}))
"""


@pytest.fixture(scope="module")
def deployments(project_root: Path) -> Path:
    return project_root / "docs" / "deployments"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `gpupool server init` makes it."""
    from jupyter_gpupool.server.daemon.certificates import new_authority

    file = tmp_path_factory.mktemp("authority") / "ca.crt"
    file.write_bytes(new_authority("tests").certificate)
    return file


def loaded(configuration: str, folder: Path, ca: Path) -> dict[str, Any]:
    file = folder / "jupyterhub_config.py"
    file.write_text(configuration)
    environment = {**os.environ, "GPUPOOL_HUB_TOKEN": "0" * 64, "GPUPOOL_CA_FILE": str(ca)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(file)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_littlest_hub_starts_its_service(deployments: Path, tmp_path: Path, ca: Path) -> None:
    ours = (deployments / "littlest-jupyterhub" / "gpupool.py").read_text()
    said = loaded(f"c = get_config()\nc.JupyterHub.spawner_class = 'simple'\n{ours}", tmp_path, ca)
    assert said["managed"]
    assert "--LocalEngine.emulate=never" in said["command"]
    assert "--GPUPoolHubService.directory=/opt/tljh/state/gpupool" in said["command"]
    assert {"custom:gpupool:use", "custom:gpupool:admin"} <= set(said["scopes"])


def test_a_hub_with_a_farm_knows_where_it_is(deployments: Path, tmp_path: Path, ca: Path) -> None:
    said = loaded((deployments / "hub-and-farm" / "jupyterhub_config.py").read_text(), tmp_path, ca)
    assert not said["managed"]
    assert said["url"] == "https://farm.example:10101"


def test_the_farms_unit_starts_what_there_is(
    deployments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    text = (deployments / "hub-and-farm" / "gpupool-hub.service").read_text().replace("\\\n", " ")
    variables = [
        shlex.split(line.partition("=")[2])[0] for line in text.splitlines() if line.startswith("Env")
    ]
    unit.read_string("\n".join(line for line in text.splitlines() if not line.startswith("Environment=")))
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[1:4] == ["-P", "-m", "jupyter_gpupool.hub.service.app"]
    for variable in variables:
        name, sign, value = variable.partition("=")
        if sign:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "0" * 64)
    app = prepared(words[4:], tmp_path)
    assert (app.port, app.exit_with_parent) == (10101, False)
    assert app.config.LocalEngine.host == "farm.example"
    assert json.loads(os.environ["GPUPOOL_HUB_NAMESPACES"]) == {"vision": "vision", "speech": "speech"}


def prepared(words: list[str], folder: Path) -> GPUPoolHubService:
    GPUPoolHubService.clear_instance()
    app = GPUPoolHubService()
    there = "--GPUPoolHubService.directory=/var/lib/gpupool"
    assert there in words
    app.initialize([f"--GPUPoolHubService.directory={folder}" if word == there else word for word in words])
    app.prepare()
    return app


def manifests(deployments: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((deployments / "zero-to-jupyterhub" / "gpupool.yaml").read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_kubernetes_own(deployments: Path, version: str) -> None:
    found = manifests(deployments)
    assert [m["kind"] for m in found] == ["PersistentVolumeClaim", "Service", "Deployment", "NetworkPolicy"]
    for manifest in found:
        kubernetes_validate.validate(manifest, version, strict=True)
    broken = {**found[2], "spec": {**found[2]["spec"], "replicas": "one"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_pods_service_starts_what_there_is(
    deployments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, deployment = manifests(deployments)[1:3]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for entry in container["env"]:
        monkeypatch.setenv(entry["name"], entry.get("value", "0" * 64))
    app = prepared(container["args"], tmp_path)
    assert app.host == "", "its name is the cluster's, not the Pod's"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"control": app.port, "data": app.config.LocalEngine.data_port}
    assert {p["name"]: p["port"] for p in service["spec"]["ports"]} == ports


class Answers(Service):
    """The service's answers, so that a Pod can be made where there is no cluster."""

    def __init__(self) -> None:
        self.begun: list[tuple[Any, ...]] = []

    async def begin(self, *words: Any) -> dict[str, Any]:
        self.begun.append(words)
        return {"state": "ACTIVE", "position": None, "reason": ""}

    async def end(self, *words: Any) -> None:
        pass

    async def offer(self, groups: list[str]) -> dict[str, Any]:
        gpu = {
            "name": "NVIDIA A100",
            "memory_mib": 40960,
            "granted_mib": 0,
            "healthy": True,
            "emulated": False,
        }
        return {"servers": [{"gpus": [gpu] * 4}], "reason": ""}


@pytest.fixture
def new_spawner(deployments: Path, ca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """KubeSpawner as the chart configures it by our values, for a user whose hub is not there."""
    from kubespawner import KubeSpawner

    monkeypatch.setenv("GPUPOOL_HUB_TOKEN", "0" * 64)
    monkeypatch.setenv("GPUPOOL_CA_FILE", str(ca))
    values = yaml.safe_load((deployments / "zero-to-jupyterhub" / "values.yaml").read_text())
    c = Config()
    c.KubeSpawner.profile_list = values["singleuser"]["profileList"]
    c.KubeSpawner.image = "{name}:{tag}".format(**values["singleuser"]["image"])
    monkeypatch.setattr("jupyter_gpupool.hub.configuration.Service", lambda *words: Answers())
    # A cluster that nobody asks anything.
    cluster = {"name": "none", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "none", "context": {"cluster": "none", "user": "none"}}
    kubeconfig = {"current-context": "none", "clusters": [cluster], "contexts": [context]}
    kubeconfig["users"] = [{"name": "none", "user": {"token": "none"}}]
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setattr(
        "kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
    )
    exec(values["hub"]["extraConfig"]["99-gpupool"], {"c": c})

    def make() -> Any:
        made = KubeSpawner(config=c, _mock=True)
        made.api_token = "of-alices-server"
        made.user.groups = []
        return made

    return make


def test_the_choice_stands_below_the_profiles(new_spawner: Any) -> None:
    async def shown() -> str:
        return await new_spawner().get_options_form()

    form = asyncio.run(shown())
    assert form.index("Large") < form.index("Request GPUs")
    assert "NVIDIA A100" in form


@pytest.mark.parametrize(("profile", "memory"), [("small", 2 << 30), ("large", 16 << 30)])
def test_a_users_pod_has_a_way_to_the_pool_and_no_gpu(
    new_spawner: Any, profile: str, memory: int, ca: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def made() -> dict[str, Any]:
        spawner = new_spawner()
        await spawner.run_auth_state_hook(None)
        said = spawner.run_options_from_form(
            {"profile": [profile], "gpupool_num_gpus": ["2"], "gpupool_partial": ["0.5"]}
        )
        spawner.user_options = said
        await spawner._run_apply_user_options(said)
        await spawner.run_pre_spawn_hook()
        await spawner.load_user_options()
        async with ApiClient() as client:
            return client.sanitize_for_serialization(await spawner.get_pod_manifest())

    pod = asyncio.run(made())
    for version in VERSIONS:
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, version, strict=True)
    (container,) = pod["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment[spawner_hooks.URL] == "https://gpupool:10101/services/gpupool"
    assert environment[spawner_hooks.TOKEN] == "of-alices-server"
    monkeypatch.setenv(spawner_hooks.URL, environment[spawner_hooks.URL])
    monkeypatch.setenv(spawner_hooks.CA, environment[spawner_hooks.CA])
    assert pool_finder.ca_for(environment[spawner_hooks.URL]).split() == ca.read_text().split()
    assert environment[spawner_hooks.MODE] == "server"
    assert GPUOptions.from_text(environment[spawner_hooks.DEFAULT]) == GPUOptions(2, 0.5)
    limits = container["resources"]["limits"]
    assert int(limits["memory"]) == memory
    assert "nvidia.com/gpu" not in limits
    assert "0" * 64 not in json.dumps(pod), "the service's own token is the hub's alone"


def test_a_profile_that_was_chosen_is_no_excuse(new_spawner: Any) -> None:
    async def apply() -> None:
        spawner = new_spawner()
        spawner.user_options = {"profile": "small", "gpupool": {"num_gpus": 9}}
        await spawner._run_apply_user_options(spawner.user_options)

    with pytest.raises(HTTPError, match="at most 2"):
        asyncio.run(apply())
