"""A real pool, real workers, real HTTP: what a client of the pool sees."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core import errors
from jupyter_gpupool.core.models import LeaseState

from ..conftest import PATIENCE_S
from ..support.processes import runs
from .conftest import Pool, ask, attach_spec, begun


def test_eighty_percent_of_two_v100s(pool: Pool) -> None:
    lease, line = pool.hold(ask(0.8, 2))
    assert lease.state is LeaseState.ACTIVE
    assert [(s.index, s.memory_mib, s.emulated) for s in lease.slices] == [(0, 26008, True), (1, 26008, True)]
    assert pool.granted_mib() == [26008, 26008]
    line.release()


def test_two_halves_share_a_gpu_and_a_third_share_waits_its_turn(pool: Pool) -> None:
    one, one_line = pool.hold(ask(0.5, filters={"index": "0"}))
    two, two_line = pool.hold(ask(0.5, filters={"index": "0"}))
    assert {s.gpu_uuid for s in one.slices} == {s.gpu_uuid for s in two.slices}
    third = pool.client.request(ask(0.3, filters={"index": "0"}))
    assert (third.state, third.position) == (LeaseState.QUEUED, 1)
    fourth = pool.client.request(ask(0.3, filters={"index": "0"}))
    assert fourth.position == 2
    with pytest.raises(errors.NoCapacity, match="does not wait"):
        pool.client.request(ask(0.3, filters={"index": "0"}, wait=False))
    one_line.release()
    granted = pool.client.wait(third.id, third, 20)
    while granted.state is not LeaseState.ACTIVE:
        granted = pool.client.wait(third.id, granted, 20)
    assert granted.slices[0].index == 0
    assert pool.client.release(fourth.id).state is LeaseState.CANCELLED
    two_line.release()


def test_a_forecast_is_what_a_request_would_come_to(pool: Pool) -> None:
    now = pool.client.forecast(ask(0.8, 2, spread=True))
    assert now["outcome"] == "granted" and [s["index"] for s in now["slices"]] == [0, 1]
    held = pool.client.request(ask(0.8, 2, spread=True))
    assert held.request.spread
    later = pool.client.forecast(ask(0.5, filters={"index": "0"}))
    assert (later["outcome"], later["position"]) == ("queued", 1)
    never = pool.client.forecast(ask(0.5, filters={"name": "H100"}))
    assert never["outcome"] == "impossible" and "H100" in never["reason"]
    with pytest.raises(errors.InvalidRequest, match="fraction"):
        pool.client.forecast(ask(2.0))
    assert [lease.id for lease in pool.client.leases()] == [held.id]
    pool.client.release(held.id)


def test_the_configured_policy_chooses_the_gpus(start_pool: Callable[..., Pool], tmp_path: Path) -> None:
    configuration = tmp_path / "jupyter_gpupool_config.py"
    configuration.write_text("c.PoolService.placement_policy = 'spread'\n")
    pool = start_pool(f"--JupyterApp.config_file={configuration}")
    first = pool.client.request(ask(0.3))
    then = pool.client.forecast(ask(0.3))
    # By the default policy, both would be on one GPU.
    assert [first.slices[0].index, then["slices"][0]["index"]] == [0, 1]
    pool.client.release(first.id)


@pytest.mark.parametrize(
    "program",
    [
        ["jupyter_gpupool", "server", "--config"],
        ["jupyter_gpupool.server.daemon.pool_app", "--JupyterApp.config_file"],
    ],
)
def test_a_policy_that_does_not_exist_gets_one_line(tmp_path: Path, program: list[str]) -> None:
    configuration = tmp_path / "jupyter_gpupool_config.py"
    configuration.write_text("c.PoolService.placement_policy = 'wide'\n")
    done = subprocess.run(
        [sys.executable, "-m", *program, configuration, "--emulate", "--port=0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in ("placement_policy", "few_servers", "spread", "wide"))


def test_repeating_a_request_is_harmless(pool: Pool) -> None:
    request = ask(0.25)
    first = pool.client.request(request, wait_s=30)
    again = pool.client.request(request)
    assert again.id == first.id and again.slices == first.slices
    assert sum(pool.granted_mib()) == 8127
    pool.client.release(first.id)


@pytest.mark.parametrize("moment", ["holding", "before it attaches"])
def test_a_killed_client_frees_its_share(
    start_pool: Callable[..., Pool], moment: str, eventually: Callable
) -> None:
    # A worker to which nobody comes waits for less long than one whose client starts on a busy machine.
    pool = start_pool(f"--LocalEngine.attach_timeout_s={600 if moment == 'holding' else 4}")
    script = (
        "import json, sys\n"
        "from jupyter_gpupool.transport.lifeline import Lifeline\n"
        "from jupyter_gpupool.transport.specs import AttachSpec\n"
        "spec = AttachSpec.from_json(sys.stdin.readline())\n"
        "line = Lifeline(spec) if sys.argv[1] == 'holding' else None\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    lease = begun(pool.client, ask(1.0))
    assert lease.worker is not None
    client = subprocess.Popen(
        [sys.executable, "-c", script, moment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert client.stdin and client.stdout
    client.stdin.write(attach_spec(lease).to_json() + "\n")
    client.stdin.flush()
    client.stdout.readline()
    client.kill()
    client.communicate()
    eventually(lambda: sum(pool.granted_mib()) == 0, "the share is free")
    assert pool.client.lease(lease.id).state in (LeaseState.RELEASED, LeaseState.EXPIRED)
    assert not runs(lease.worker.pid)


def test_a_killed_worker_loses_its_lease_alone(pool: Pool, eventually: Callable) -> None:
    lost, lost_line = pool.hold(ask(0.5))
    kept, kept_line = pool.hold(ask(0.5))
    assert lost.worker is not None
    os.kill(lost.worker.pid, signal.SIGKILL)
    eventually(lambda: pool.client.lease(lost.id).state is LeaseState.LOST, "the lease is lost")
    assert "SIGKILL" in pool.client.lease(lost.id).reason
    assert pool.client.lease(kept.id).state is LeaseState.ACTIVE
    assert sum(pool.granted_mib()) == 16255
    with pytest.raises(errors.LeaseEnded, match="has ended"):
        pool.client.heartbeat(lost.id)
    for line in (lost_line, kept_line):
        line.release()


def test_without_heartbeats_a_lease_expires(start_pool: Callable[..., Pool], eventually: Callable) -> None:
    pool = start_pool("--PoolService.ttl_s=1", "--LocalEngine.resume_s=1")
    lease, line = pool.hold(ask(0.5))
    queued = pool.client.request(ask(1.0, 2))
    eventually(lambda: pool.client.lease(lease.id).state is LeaseState.EXPIRED, "the lease expires")
    eventually(lambda: pool.client.lease(queued.id).state.ended, "so does the request that nobody waits for")
    eventually(lambda: not line.alive, "its worker is gone")
    line.release()


def test_a_release_is_done_when_it_returns(pool: Pool) -> None:
    lease, line = pool.hold(ask(1.0))
    assert lease.worker is not None
    assert pool.client.release(lease.id).state is LeaseState.RELEASED
    assert not runs(lease.worker.pid)
    assert pool.client.release(lease.id).state is LeaseState.RELEASED, "twice is harmless"
    line.release()


def test_the_pool_shows_what_is_used(pool: Pool, eventually: Callable) -> None:
    lease, line = pool.hold(ask(0.5))
    script = (
        "import sys, torch\n"
        "from jupyter_gpupool.pytorch.client import session\n"
        "from jupyter_gpupool.transport.specs import AttachSpec\n"
        "session.activate(AttachSpec.from_json(sys.stdin.readline()))\n"
        "x = torch.ones(100 << 20, dtype=torch.uint8, device='cuda')\n"
        "print(x[0].item(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin and program.stdout
    program.stdin.write(attach_spec(lease).to_json() + "\n")
    program.stdin.flush()
    program.stdout.readline()
    eventually(lambda: _gpu(pool, 0)["used_mib"] == 100, "the memory is shown")
    assert _gpu(pool, 0)["slices"][0]["used_mib"] == 100
    program.communicate()
    eventually(lambda: _gpu(pool, 0)["used_mib"] == 0, "and that it is free again")
    line.release()


def _gpu(pool: Pool, index: int) -> dict:
    return pool.client.pool()["servers"][0]["gpus"][index]


class TestRefusals:
    def call(self, pool: Pool, method: str, path: str, **options: object) -> httpx.Response:
        address = discovery.find()
        assert address is not None
        headers = {"Authorization": f"Bearer {address.token}", **options.pop("headers", {})}  # type: ignore[dict-item]
        url = f"{address.url}/gpupool/api/v1{path}"
        return httpx.request(method, url, headers=headers, trust_env=False, timeout=PATIENCE_S, **options)  # type: ignore[arg-type]

    BAD_REQUESTS = [
        ("{", 400, "not JSON"),
        ("[]", 400, "not a JSON object"),
        ("[" * 5000, 400, "not JSON"),
        ('{"num_gpus": 1}', 400, "id is missing"),
        ('{"id": "x", "partial": 1}', 400, "uuid"),
        ('{"id": "ID", "colour": 1}', 400, "unknown field 'colour'"),
        ('{"id": "ID", "owner": "root"}', 400, "unknown field 'owner'"),
        ('{"id": "ID", "num_gpus": "2"}', 400, "num_gpus is a str, not int"),
        ('{"id": "ID", "num_gpus": true}', 400, "num_gpus is a bool"),
        ('{"id": "ID", "partial": NaN}', 400, "fraction"),
        ('{"id": "ID", "partial": 0.5, "memory_mib": 5}', 400, "not both"),
        ('{"id": "ID", "partial": 0.5, "filters": {"index": 1}}', 400, "filters"),
        ('{"id": "ID", "partial": 0.5, "num_gpus": 9, "secret_sha256": "SHA"}', 422, "9 GPUs"),
    ]

    def test_bad_requests(self, pool: Pool) -> None:
        for body, status, words in self.BAD_REQUESTS:
            body = body.replace("ID", "6a2c1f0e-5d3b-4a51-9b1f-0d3c5a7e9b11").replace("SHA", "0" * 64)
            answer = self.call(pool, "POST", "/leases", content=body)
            assert answer.status_code == status, (body, answer.text)
            assert words in answer.json()["message"], body
            assert "\n" not in answer.json()["message"]
        assert pool.client.leases(include_ended=True) == []

    def test_a_body_that_is_too_large(self, pool: Pool) -> None:
        answer = self.call(pool, "POST", "/leases", content=json.dumps({"label": "x" * 100_000}))
        assert answer.status_code == 400 and "65536 are allowed" in answer.json()["message"]

    def test_calls_that_do_not_exist(self, pool: Pool) -> None:
        assert self.call(pool, "GET", "/nonsense").status_code == 404
        assert self.call(pool, "PUT", "/leases").status_code == 405
        assert self.call(pool, "GET", "/leases/not-a-lease").json()["error"] == "UnknownLease"

    def test_nothing_without_the_token(self, pool: Pool) -> None:
        for path in ("/pool", "/leases", "/health", "/openapi.json", "/nonsense"):
            for header in (b"", b"Bearer", b"Bearer wrong", b"Basic x", b"Bearer \x80"):
                answer = self.call(pool, "GET", path, headers={"Authorization": header})
                assert answer.status_code == 401, (path, header)
                assert "Authorization: Bearer" in answer.json()["message"]

    def test_an_unreachable_pool(self) -> None:
        with pytest.raises(errors.PoolUnreachable, match="no GPU pool answers at http://127.0.0.1:1"):
            PoolClient("http://127.0.0.1:1", patience_s=0.1).pool()
        for nonsense in ("not a url", "ftp://x", "http://"):
            with pytest.raises(errors.PoolUnreachable, match="no address of a GPU pool"):
                PoolClient(nonsense)


def test_a_lease_is_resized(pool: Pool) -> None:
    lease, lifeline = pool.hold(ask(0.5))
    resized = pool.client.resize(lease.id, memory_mib=300)
    assert [piece.memory_mib for piece in resized.slices] == [300] and pool.granted_mib() == [300, 0]
    with pytest.raises(errors.UnknownLease):
        pool.client.resize(str(uuid.uuid4()), 0.5)
    for body, reason in (
        ({}, "give a fraction"),
        ({"partial": 2}, "at most 1, not 2"),
        ({"partial": "all"}, "partial is a str"),
        ({"partial": 0.5, "owner": "eve"}, "unknown field"),
        ({"partial": 0.5, "num_gpus": 2}, "keeps its number of GPUs (1)"),
    ):
        answer = TestRefusals().call(pool, "PATCH", f"/leases/{lease.id}", json=body)
        assert answer.status_code == 400 and reason in answer.json()["message"], answer.text
    assert pool.granted_mib() == [300, 0]
    lifeline.release()


def test_the_description_is_valid_openapi(pool: Pool) -> None:
    from openapi_spec_validator import validate

    description = pool.client._call("GET", "/openapi.json")
    validate(description)
    assert set(description["paths"]) >= {
        "/pool",
        "/leases",
        "/leases/{id}",
        "/leases/{id}/heartbeat",
        "/health",
    }


def test_health_names_its_checks(pool: Pool) -> None:
    health = pool.client.health()
    assert health["status"] in ("ok", "warning")
    checks = {check["name"]: check for check in health["checks"]}
    assert {"ledger", "gpus", "engine", "disk", "memory"} <= set(checks)
    assert checks["gpus"]["detail"] == "2 found, 2 of them emulated"


class TestDiscovery:
    def test_what_is_published_is_for_this_user_alone(self, pool: Pool) -> None:
        path = discovery.folder() / f"pool-{pool.process.pid}.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(discovery.folder().stat().st_mode) == 0o700

    def test_a_dead_pool_is_not_found(self, pool: Pool) -> None:
        pool.process.kill()
        pool.process.wait()
        assert discovery.find() is None
        assert list(discovery.folder().glob("pool-*.json")) == []

    def test_a_second_pool_on_the_ledger_is_refused(self, pool: Pool, tmp_path: Path) -> None:
        second = subprocess.run(
            [sys.executable, "-m", "jupyter_gpupool.server.daemon.pool_app", "--port=0"]
            + [f"--db-url=sqlite:///{tmp_path / 'ledger.sqlite'}"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert second.returncode == 1
        assert f"process {pool.process.pid} runs a pool on this ledger already" in second.stderr
        assert "Traceback" not in second.stderr

    def test_a_pool_started_for_a_while_ends_with_its_starter(self, eventually: Callable) -> None:
        """...and two who look at the same moment start one."""
        script = (
            "import sys, threading\n"
            "from jupyter_gpupool.client import discovery\n"
            "found = []\n"
            "threads = [threading.Thread(target=lambda: found.append(discovery.find_or_start())) for _ in range(2)]\n"
            "[t.start() for t in threads]; [t.join() for t in threads]\n"
            "assert len({a.pid for a in found}) == 1\n"
            "print(found[0].pid, flush=True)\n"
            "sys.stdin.read()\n"
        )
        starter = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert starter.stdout
        pool = psutil.Process(int(starter.stdout.readline()))
        family = [pool, *pool.children(recursive=True)]
        starter.kill()
        starter.communicate()
        eventually(lambda: not any(map(runs, family)), "no process is left")
        assert discovery.find() is None

    def test_it_takes_none_of_its_starters_files_for_modules(self, tmp_path: Path) -> None:
        for name in ("types", "queue", "random", "tornado", "torch", "jupyter_gpupool"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('this is a file of the user')")
        script = (
            "import sys; sys.path.remove('')\n"
            "from jupyter_gpupool.client import pool_finder, requests\n"
            "client, _ = pool_finder.find_pool()\n"
            "lease = requests.acquire(client, requests.new_request(partial=0.1)[0])\n"
            "print(lease.state.name)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.stdout.split() == ["ACTIVE"], done.stderr


def test_an_embedded_pool_that_is_killed_leaves_no_process(pool: Pool, eventually: Callable) -> None:
    _, line = pool.hold(ask(0.5))
    family = [pool.process, *psutil.Process(pool.process.pid).children(recursive=True)]
    assert len(family) >= 3, "the pool, its warm parent and a worker"
    pool.process.kill()
    pool.process.wait()
    eventually(lambda: not any(map(runs, family[1:])), "no process is left")
    line.release()


def test_many_clients_at_once(pool: Pool) -> None:
    """Ten clients, thirty leases each of a tenth of a GPU: never more than there is, and all get theirs."""
    peaks: list[int] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(3):
                lease, line = pool.hold(ask(0.3))
                peaks.append(max(pool.granted_mib()))
                line.release()
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert len(peaks) == 18 and max(peaks) <= 32510
