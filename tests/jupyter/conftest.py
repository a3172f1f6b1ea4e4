"""Pools of emulated GPUs and installed kernelspecs, for tests that start kernels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from jupyter_core.paths import jupyter_data_dir, jupyter_runtime_dir

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient

from ..conftest import PATIENCE_S

#: Not the name that the package installs it by: an environment's kernelspecs go before a user's.
KERNEL = "as-installed"


@pytest.fixture(autouse=True)
def patient_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that starts in this process waits for its worker, however long PyTorch takes to import."""
    monkeypatch.setattr("jupyter_gpupool.jupyter.kernel_lease._OPTIONAL_WAIT_S", PATIENCE_S)


@pytest.fixture
def kernelspec(project_root: Path) -> Callable[..., str]:
    """``kernelspec(name=..., **config)`` installs a kernelspec whose provisioner is configured so; its name.

    Without arguments it is the one that the package installs.
    """

    def install(name: str = KERNEL, **config: Any) -> str:
        spec = json.loads((project_root / "jupyter_gpupool/jupyter/kernelspec/kernel.json").read_text())
        if config:
            spec["metadata"]["kernel_provisioner"]["config"] = config
        folder = Path(jupyter_data_dir()) / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.json").write_text(json.dumps(spec))
        return name

    return install


@pytest.fixture
def start_pool(eventually: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., PoolClient]]:
    """Starts a pool in a process of its own that this test's kernels find; returns a client of it."""
    running: list[tuple[subprocess.Popen, PoolClient]] = []

    def start(*options: str) -> PoolClient:
        ledger = f"--db-url=sqlite:///{tmp_path / 'pool.sqlite'}"
        command = [
            sys.executable,
            "-m",
            "jupyter_gpupool.server.daemon.pool_app",
            "--port=0",
            "--emulate",
            "--LocalEngine.attach_timeout_s=60",
            ledger,
        ]
        process = subprocess.Popen([*command, *options], start_new_session=True)

        def published() -> discovery.PoolAddress | None:
            assert process.poll() is None, "the pool ended at its start"
            address = discovery.find()
            return address if address is not None and address.pid == process.pid else None

        address = eventually(published, "the pool answers")
        client = PoolClient(address.url, address.token, timeout_s=PATIENCE_S)
        running.append((process, client))
        return client

    yield start
    for process, client in running:
        client.close()
        process.terminate()
    for process, _ in running:
        process.wait(300)


@pytest.fixture
def pool(start_pool: Callable[..., PoolClient]) -> PoolClient:
    """A pool of one emulated GPU."""
    return start_pool("--LocalEngine.emulated_count=1")


@pytest.fixture
def workers_of() -> Callable[[PoolClient], list[int]]:
    """The processes of a pool's live leases."""
    return lambda pool: [lease.worker.pid for lease in pool.leases() if lease.worker is not None]


@pytest.fixture(autouse=True)
def no_kernel_is_left(jupyter_home: Path, eventually: Callable[..., Any]) -> Iterator[None]:
    """Every kernel that a test started has ended with it: they are told by their connection files."""
    yield
    runtime = (jupyter_runtime_dir(), os.fspath(jupyter_home))

    def kernels() -> list[psutil.Process]:
        return [
            p
            for p in psutil.process_iter(["cmdline", "status"])
            if p.info["status"] != psutil.STATUS_ZOMBIE
            and "ipykernel_launcher" in (p.info["cmdline"] or [])
            and any(word.startswith(runtime) for word in p.info["cmdline"])
        ]

    try:
        psutil.wait_procs(kernels(), timeout=PATIENCE_S)
    finally:
        left = [(p.pid, p.info["cmdline"]) for p in kernels()]
    assert not left, "no kernel is to outlive its test"


@pytest.fixture
def start_server(tmp_path: Path, eventually: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """``start_server(*options)`` starts a real Jupyter server; its process, and a client of its pool's API.

    It is a server of two emulated GPUs unless an option says otherwise.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> tuple[subprocess.Popen[bytes], httpx.Client]:
        log = tmp_path / f"server-{len(started)}.log"
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
        command += ["--port=0", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path}"]
        command += [
            "--ServerApp.jpserver_extensions={'jupyter_gpupool': True}",
            "--LocalEngine.emulate=always",
            "--LocalEngine.attach_timeout_s=60",
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *options], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        started.append(process)
        info = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"jpserver-{process.pid}.json"

        def client() -> httpx.Client | None:
            assert process.poll() is None, log.read_text()
            try:
                said = json.loads(info.read_text())
            except (OSError, ValueError):
                return None
            headers = {"Authorization": f"token {said['token']}"}
            http = httpx.Client(base_url=f"{said['url']}gpupool/api/v1", headers=headers, timeout=300)
            try:
                if http.get("/pool").status_code == 200:
                    return http
            except httpx.TransportError:
                pass
            http.close()
            return None

        return process, eventually(client, f"{log.name}: the pool answers")

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in started:
        process.wait(300)
