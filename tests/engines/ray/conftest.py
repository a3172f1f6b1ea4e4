"""A real Ray cluster of three nodes on loopback, each with two GPUs that exist in name only, and a pool on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.models import Lease, LeaseState, Request
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from ...support import other_release
from ...support.ports import free_port

# Before Ray is imported, which reads them then. Nothing of a test is reported to anybody.
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # A machine with two cores that runs other tests beside these takes its time.
        "RAY_raylet_start_wait_time_s": "40",
        "RAY_agent_register_timeout_ms": "180000",
        "RAY_worker_register_timeout_seconds": "180",
    }
)

pytest.importorskip("torch", reason="workers need PyTorch")
ray = pytest.importorskip(
    "ray", reason="the engine for many servers needs Ray: pip install 'jupyter_gpupool[ray]'"
)

Cluster = pytest.importorskip("ray.cluster_utils").Cluster

NAMES = ("alpha", "beta", "gamma")


def repeatedly(start: Callable[[], Any]) -> Any:
    """A raylet gives up when processes of its own take longer than 15 s to start, as they do on a busy machine."""
    for _ in range(10):
        try:
            return start()
        except Exception as e:
            failure = e
    raise failure


class Farm:
    """Three GPU servers, called :data:`NAMES`; more may join. The first one is Ray's head."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self._cluster = repeatedly(
            lambda: Cluster(initialize_head=True, head_node_args=self._node("alpha", head=True))
        )
        self.nodes["alpha"] = self._cluster.head_node
        for name in NAMES[1:]:
            self.join(name)

    @property
    def address(self) -> str:
        return self._cluster.address

    def join(self, name: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # What a node writes outlives the test in which it joins.
            patch.setenv("JUPYTER_RUNTIME_DIR", self._cluster.head_node.get_session_dir_path())
            self.nodes[name] = repeatedly(lambda: self._cluster.add_node(**self._node(name)))

    def kill(self, name: str) -> None:
        self._cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def processes(self, name: str) -> list[psutil.Process]:
        """The node's raylet and whatever it has started: Ray's own processes, the agent, the workers."""
        raylet = psutil.Process(self.nodes[name].all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def freeze(self, name: str) -> list[psutil.Process]:
        """Let nothing come from that node, and nothing be answered there."""
        frozen = self.processes(name)
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        return frozen

    def shutdown(self) -> None:
        self._cluster.shutdown()

    def _node(self, name: str, head: bool = False) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "num_cpus": 2,
            "num_gpus": 2,
            "node_name": name,
            # Ray takes 127.0.0.1 to mean the machine's own address; the rest of loopback it leaves alone.
            "node_ip_address": f"127.0.0.{2 + len(self.nodes)}",
            "object_store_memory": 80 << 20,
            "include_dashboard": False,
            "include_log_monitor": False,
            # Otherwise a raylet waits half a minute at most for processes of its own to say their ports.
            "metrics_agent_port": free_port(),
            "metrics_export_port": free_port(),
            "runtime_env_agent_port": free_port(),
            "dashboard_agent_listen_port": free_port(),
        }
        if head:
            settings["no_monitor"] = True  # nothing here is scaled
            # A node whose network is cut for less than a minute is not given up by Ray itself.
            settings["_system_config"] = {"health_check_failure_threshold": 20}
        return settings


class Pool:
    """A pool in a process of its own, which may be killed and started again on the same ledger."""

    def __init__(self, farm: Farm, folder: Path, *options: str) -> None:
        self._folder = folder
        self._lines: list[Lifeline] = []
        self._words = [
            "--port=0",
            "--persistent",
            f"--db-url=sqlite:///{folder / 'ledger.sqlite'}",
            "--PoolService.engine_name=ray",
            "--PoolService.ttl_s=600",  # these holders send no heartbeats
            f"--RayEngine.address={farm.address}",
            *options,
        ]
        self.start()

    def start(self) -> None:
        environment = dict(os.environ)
        for variable in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            environment[variable] = str(self._folder)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_gpupool.server.daemon.pool_app", *self._words], env=environment
        )
        published = self._folder / "gpupool" / f"pool-{self.process.pid}.json"
        wait_until(lambda: self.process.poll() is not None or published.exists(), "the pool answers")
        assert self.process.poll() is None, "the pool ended at its start"
        address = json.loads(published.read_text())
        self.client = PoolClient(address["url"], address["token"], timeout_s=300.0)
        #: of a process that uses this pool
        self.environment = {**os.environ, "GPUPOOL_URL": address["url"], "GPUPOOL_TOKEN": address["token"]}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.returncode == 0, "it ends in good order"

    def gpus(self) -> list[dict[str, Any]]:
        return [gpu for server in self.client.pool()["servers"] for gpu in server["gpus"]]

    def servers(self) -> list[str]:
        return [server["name"] for server in self.client.pool()["servers"]]

    def granted_mib(self) -> int:
        return sum(gpu["granted_mib"] for gpu in self.gpus())

    def hold(self, request: Request) -> tuple[Lease, Lifeline]:
        """Request, wait for the worker, and hold it as this process."""
        # Asking again is harmless, and who asks counts as alive until the worker is there.
        lease = self.client.request(request, wait_s=30)
        while lease.state in (LeaseState.QUEUED, LeaseState.GRANTED):
            lease = self.client.request(request, wait_s=30)
        assert lease.state is LeaseState.ACTIVE, lease
        self._lines.append(Lifeline(spec_of(lease)))
        return lease, self._lines[-1]

    def let_go(self) -> None:
        """Of whatever a test left behind."""
        while self._lines:
            self._lines.pop().release()
        for lease in self.client.leases():
            self.client.release(lease.id)


SECRET = "known to the client alone"


def ask(partial: float = 0.5, num_gpus: int = 1, **fields: Any) -> Request:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    return Request(str(uuid.uuid4()), "", num_gpus, partial, secret_sha256=digest, **fields)


def spec_of(lease: Lease) -> AttachSpec:
    assert lease.worker is not None, lease
    devices = tuple(
        DeviceSpec(n, s.gpu_uuid, s.name, s.memory_mib, s.total_mib, s.emulated)
        for n, s in enumerate(lease.slices)
    )
    workers = [lease.worker.on(piece.server) for piece in lease.slices]
    addresses = tuple((worker.host, worker.port) for worker in workers)
    where = (lease.worker.host, lease.worker.port)
    return AttachSpec(lease.id, *where, SECRET, devices, lease.ttl_s, addresses=addresses)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = 300) -> Any:
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {deadline_s:g} s: {what}", pytrace=False)
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    farm = Farm()
    try:
        ray.init(address=farm.address, namespace="tests", log_to_driver=False, logging_level="ERROR")
        yield farm
    finally:
        ray.shutdown()
        farm.shutdown()


@pytest.fixture(scope="module")
def pool(farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("farm")
    environments = {"other": other_release.interpreter(folder)}
    options = (
        f"--RayEngine.environments={environments}",
        "--PoolService.move_for_others=True",
        # Parking is each namespace's choice; unless one chooses it, nothing is parked.
        "--PoolService.min_resident_s=0",
        "--RayEngine.park_memory_mib=64",
    )
    pool = Pool(farm, folder, *options)
    try:
        wait_until(lambda: len(pool.servers()) == 3, "three GPU servers are there")
        yield pool
    finally:
        pool.stop()
