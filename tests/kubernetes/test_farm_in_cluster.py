"""Two pool servers on PostgreSQL and a GPU server within the cluster, of the objects of `manifests --farm`."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jupyter_gpupool.client import bundle
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import NotLeading, PoolError
from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.kubernetes.farm_manifests import AUTHORITY, HEAD, REPLICAS, SERVER
from jupyter_gpupool.kubernetes.names import GPU, INJECT, MANAGED, SHARE_PERCENT
from jupyter_gpupool.kubernetes.pool_manifests import METRICS_PORT, NAME

from ..conftest import PATIENCE_S
from ..server.daemon.conftest import COMMAND, gpupool
from ..support.ports import free_ports
from .cluster import Cluster, needs_api_server, running_cluster
from .pods import pod
from .running_controller import RunningController

pytestmark = needs_api_server
pytest.importorskip("ray", reason="GPU servers of several nodes need Ray")

SYSTEM, TEAM = "gpupool-system", "team"
PODS = [f"{NAME}-{n}" for n in range(REPLICAS)]
DATABASE = "gpupool-database"
#: A machine with two cores that runs other tests beside these takes its time.
PATIENT = {
    "RAY_raylet_start_wait_time_s": "40",
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_worker_register_timeout_seconds": "180",
}
#: Counts on the GPU without end, so that a gap or a repetition would show.
COUNTS = """\
import time, torch
x = torch.zeros(1, device="cuda")
while True:
    x += 1
    print("counted", int(x.item()), flush=True)
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, project_root: Path, postgresql: Any
) -> Iterator[Cluster]:
    yield from running_cluster(tmp_path_factory, project_root, visible=[postgresql.folder])


class Farm:
    """The pool of the cluster, as its administrator sets it up and uses it."""

    def __init__(self, cluster: Cluster, folder: Path, db_url: str) -> None:
        self.cluster, self.plane = cluster, cluster.plane
        self.addresses = {name: cluster.kubelet.address(SYSTEM, name) for name in PODS}
        self._db_url = db_url
        self._port, self._ray_port = free_ports(2)
        self._head = cluster.kubelet.address(SYSTEM, f"{HEAD}-0")
        self.bundle = folder / "administrator"
        options = ["--image", "gpupool:1", "--tls", folder / "tls", "--kubernetes", "1.20"]
        options += ["--pool", "0", "--farm", "--database", DATABASE]
        done = gpupool("kubernetes", "manifests", *options)
        assert done.returncode == 0, done.stderr
        self.objects = [
            one
            for one in yaml.safe_load_all(done.stdout)
            if one["metadata"]["name"] in (NAME, HEAD, SERVER, "gpupool-pool")
        ]
        self.plane.new_namespace(SYSTEM)
        made = gpupool("server", "init", "--address", "localhost", folder / "server")
        assert made.returncode == 0, made.stderr
        files = [f"--from-file={folder}/server/{name}" for name in ("ca.crt", "ca.key")]
        token = "--from-literal=ray.token=0123456789abcdef0123456789abcdef"
        self._create_secret(AUTHORITY, *files, token)
        self._create_secret(DATABASE, f"--from-literal=url={db_url}")
        self.clients: list[PoolClient] = []

    def start(self) -> None:
        (daemons,) = [one for one in self.objects if one["kind"] == "DaemonSet"]
        self.printed_server = copy.deepcopy(daemons["spec"]["template"])
        for one in self.objects:
            self._adjust(one)
        programs = {"StatefulSet " + HEAD: [], "DaemonSet " + SERVER: [], "StatefulSet " + NAME: []}
        others: list[dict[str, Any]] = []
        for one in self.objects:
            programs.get(f"{one['kind']} {one['metadata']['name']}", others).append(one)
        self.plane.create(*others)
        # One after the other, because a raylet gives its own processes 15 s to start, and else ends.
        for found in programs.values():
            self.plane.create(*found)
            self.wait_for_ray(found[0]["metadata"]["name"])

    def wait_for_ray(self, name: str) -> None:
        words = ("logs", "-l", f"app.kubernetes.io/name={name}", "-n", SYSTEM, "--tail=-1")
        self.plane.wait(
            lambda: "Ray runtime started" in self.plane.kubectl(*words).stdout, f"that {name} joins Ray"
        )

    def _create_secret(self, name: str, *sources: str) -> None:
        done = self.plane.kubectl("create", "secret", "generic", name, *sources, "-n", SYSTEM)
        assert done.returncode == 0, done.stderr

    def _adjust(self, one: dict[str, Any]) -> None:
        """All Pods of this node share its ports and names, so each listens at its own address only."""
        if one["kind"] == "ConfigMap":
            text = one["data"]["gpupool_config.py"]
            for name, address in self.addresses.items():
                text = text.replace(f"{name}.gpupool-pool.{SYSTEM}.svc", address)
            own = f'os.environ["POD_NAME"] + ".gpupool-pool.{SYSTEM}.svc"'
            assert own in text
            text = text.replace(own, 'os.environ["POD_IP"]')
            text += 'c.GPUPoolDaemon.host = os.environ["POD_IP"]\n'
            text += f"c.GPUPoolDaemon.port = {self._port}\nc.RayEngine.data_port = 0\n"
            one["data"]["gpupool_config.py"] = text
            return
        if one["kind"] not in ("StatefulSet", "DaemonSet"):
            return
        self._adjust_program(one["spec"]["template"]["spec"])

    def _adjust_program(self, spec: dict[str, Any]) -> None:
        (program,) = spec["containers"]
        program["env"] += [{"name": name, "value": value} for name, value in PATIENT.items()]
        of_ray = ("metrics-export", "runtime-env-agent", "dashboard-agent-listen", "dashboard-agent-grpc")
        options = [f"--{name}-port={port}" for name, port in zip(of_ray, free_ports(len(of_ray)))]
        options.append("--include-log-monitor=false")
        command = program["command"]
        head = f"{HEAD}.{SYSTEM}.svc"
        if command[0] == "ray":
            command[2:2] = options
        else:
            command[-1] = command[-1].replace("ray start", " ".join(["ray start", *options]))
            assert f"0.0.0.0:{METRICS_PORT}" in command[-1]
            command[-1] = command[-1].replace(f"0.0.0.0:{METRICS_PORT}", f"$POD_IP:{METRICS_PORT}")
        program["command"] = [
            word.replace(head, self._head).replace("6379", str(self._ray_port)) for word in command
        ]

    def add_server(self, name: str) -> None:
        """One more GPU server, as if there were another node of that name."""
        template = copy.deepcopy(self.printed_server)
        self._adjust_program(template["spec"])
        (program,) = template["spec"]["containers"]
        program["command"] = [word.replace("$(NODE_NAME)", name) for word in program["command"]]
        template["metadata"]["labels"] = {"app.kubernetes.io/name": name}
        spec = {
            "serviceName": name,
            "replicas": 1,
            "selector": {"matchLabels": template["metadata"]["labels"]},
            "template": template,
        }
        metadata = {"name": name, "namespace": SYSTEM}
        self.plane.create(
            {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec}
        )

    def make_administrator(self) -> None:
        """Have a pool server's Pod make an administrator's token, as `kubectl exec` does."""
        self.plane.wait(self._directory, "a pool server's directory")
        environment = {
            **os.environ,
            "POD_NAME": PODS[0],
            "POD_IP": self.addresses[PODS[0]],
            "DATABASE_URL": self._db_url,
        }
        command = [*COMMAND, "server", "administrator", "--output", "-", str(self._directory())]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        self.bundle.mkdir()
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            tar.extractall(self.bundle)
        named = yaml.safe_load((self.bundle / bundle.SERVERS).read_text())["servers"]
        addresses = [server["addresses"] for server in named]
        assert addresses == [[f"{address}:{self._port}"] for address in self.addresses.values()]
        self.administrator = self.client(*PODS, patience_s=PATIENCE_S)

    def _directory(self) -> Path | None:
        with contextlib.suppress(ValueError, KeyError):
            found = self.cluster.kubelet.folder(SYSTEM, PODS[0], "directory") / "server"
            # The certificate is there, and the authority's key no longer.
            return found if (found / "server.crt").exists() and not (found / "ca.key").exists() else None
        return None

    def client(self, *names: str, patience_s: float = 0.0) -> PoolClient:
        first, *also = (f"https://{self.addresses[name]}:{self._port}" for name in names)
        token = yaml.safe_load((self.bundle / bundle.CLIENT).read_text())["token"]
        ca = (self.bundle / bundle.CA).read_text()
        made = PoolClient(first, token, timeout_s=PATIENCE_S, ca=ca, patience_s=patience_s, also=also)
        self.clients.append(made)
        return made

    def leader(self) -> str:
        """The Pod that leads; empty while none does."""
        for name in PODS:
            with contextlib.suppress(PoolError), self.client(name) as client:
                client.health()
                try:
                    client.release("no-such-lease")
                except NotLeading:
                    continue
                except PoolError:
                    return name
        return ""

    def log(self, name: str, container: str) -> str:
        return self.plane.kubectl("logs", name, "-c", container, "-n", SYSTEM).stdout


@pytest.fixture(scope="module")
def farm(cluster: Cluster, postgresql: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with postgresql.database("ready") as url:
        made = Farm(cluster, tmp_path_factory.mktemp("farm"), url)
        yield made
        for client in made.clients:
            client.close()
        words = ("delete", "statefulset,daemonset", "--all", "-n", SYSTEM, "--wait=false")
        assert made.plane.kubectl(*words).returncode == 0
        made.plane.wait(lambda: not made.plane.get("pods", "-n", SYSTEM)["items"], "the end of the farm")


def test_the_api_server_takes_a_farm(farm: Farm) -> None:
    done = farm.plane.kubectl("apply", "--dry-run=server", "-f", "-", given=farm.objects)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(server dry run)") == len(farm.objects)


@pytest.fixture(scope="module")
def running(farm: Farm) -> Farm:
    """The farm, with its administrator and one GPU server."""
    farm.start()
    farm.make_administrator()
    farm.plane.wait(lambda: farm.administrator.pool()["servers"], "a GPU server")
    servers = farm.administrator.pool()["servers"]
    assert [server["name"] for server in servers] == [farm.cluster.kubelet.name]
    assert [gpu["emulated"] for gpu in servers[0]["gpus"]] == [True, True]
    return farm


@pytest.fixture(scope="module")
def controller(running: Farm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    made = RunningController(running.cluster, tmp_path_factory.mktemp("controller"), running.bundle)
    running.plane.wait(made.has_token, "the controller's account")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def team(running: Farm, controller: RunningController) -> Iterator[str]:
    """A namespace with a Pod that counts, and the lease of it."""
    plane = running.plane
    metadata = {"name": TEAM, "labels": {MANAGED: "true"}}
    plane.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    plane.wait_for_namespace(TEAM)
    asked = pod({GPU: "1", SHARE_PERCENT: "50"}, labels={INJECT: "true"}, command=["python", "-c", COUNTS])
    done = plane.kubectl("create", "-n", TEAM, "-f", "-", given=[asked])
    assert done.returncode == 0, done.stderr
    plane.wait(lambda: len(counted(running)) >= 3, "that the Pod counts")
    yield TEAM
    assert plane.kubectl("delete", "pod", "train", "-n", TEAM, "--now").returncode == 0
    plane.wait(lambda: not running.administrator.leases(), "the end of the lease")


def counted(farm: Farm) -> list[int]:
    lines = farm.cluster.log(TEAM, "train").splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("counted ")]


def counts_on(farm: Farm) -> bool:
    """Whether the Pod has counted further than now, without a gap or a repetition."""
    before = len(counted(farm))
    farm.plane.wait(lambda: len(counted(farm)) >= before + 3, "that the Pod counts on")
    numbers = counted(farm)
    return numbers == list(range(1, len(numbers) + 1))


def test_a_pod_keeps_its_lease_while_the_leading_pool_server_is_replaced(
    running: Farm, team: str, eventually: Callable[..., Any]
) -> None:
    farm = running
    (lease,) = farm.administrator.leases()
    leader = farm.leader()
    # Only the one that leads has joined Ray's servers; a client asks the other one in vain, and goes on to it.
    (follower,) = set(PODS) - {leader}
    with farm.client(follower) as client, pytest.raises(NotLeading):
        client.pool()
    uid = farm.plane.get("pod", leader, "-n", SYSTEM)["metadata"]["uid"]
    assert farm.plane.kubectl("delete", "pod", leader, "-n", SYSTEM, "--now").returncode == 0
    eventually(lambda: farm.leader() not in ("", leader), "that the other one leads")
    assert counts_on(farm)
    (kept,) = farm.administrator.leases()
    assert (kept.id, kept.state) == (lease.id, LeaseState.ACTIVE)

    def is_back() -> bool:
        found = farm.plane.kubectl("get", "pod", leader, "-n", SYSTEM, "-o", "jsonpath={.metadata.uid}")
        if found.returncode or found.stdout == uid:
            return False
        with contextlib.suppress(PoolError), farm.client(leader) as client:
            return [one.id for one in client.leases()] == [lease.id]
        return False

    eventually(is_back, "that the replaced one answers")


def test_a_pod_is_told_that_its_lease_has_moved(
    running: Farm, team: str, eventually: Callable[..., Any]
) -> None:
    farm, administrator = running, running.administrator
    farm.add_server("node-2")
    eventually(lambda: len(administrator.pool()["servers"]) == 2, "the second GPU server")
    (lease,) = administrator.leases()
    source = lease.slices[0].server
    (target,) = {"node-1", "node-2"} - {source}
    administrator.drain(source, move=True)

    def told() -> dict[str, str]:
        events = farm.plane.get("events", "-n", team)["items"]
        return {e["reason"]: e["message"] for e in events if e["involvedObject"].get("name") == "train"}

    eventually(lambda: "Moved" in told(), "the Event about the move")
    (moved,) = administrator.leases()
    assert (moved.id, moved.state, moved.slices[0].server) == (lease.id, LeaseState.ACTIVE, target)
    assert told()["Moved"] == f"Moved from {source} to 0 of {target}"
    assert counts_on(farm)
    administrator.drain(source, False)
