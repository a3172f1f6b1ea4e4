"""Kernels of a real Jupyter server with slices of its pool: at random, when it is killed, and without PyTorch."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from jupyter_core.paths import jupyter_data_dir

from ..conftest import often
from ..support.processes import runs

#: How many kernels at once, and for how many seconds things happen to them.
KERNELS = often(8, 40)
SECONDS = often(10, 120)


class Notebooks:
    """What JupyterLab does with kernels, over HTTP."""

    def __init__(self, api: httpx.Client) -> None:
        self.api = api
        self.http = httpx.Client(
            base_url=str(api.base_url).split("gpupool/")[0], headers=api.headers, timeout=300
        )

    def start(self, spec: str, wish: dict[str, Any]) -> str:
        kernel_id = str(uuid.uuid4())
        self.api.put(f"/kernels/{kernel_id}", json=wish).raise_for_status()
        body = {"name": spec, "kernel_id": kernel_id}
        self.http.post("/api/kernels", json=body).raise_for_status()
        return kernel_id

    def do(self, kernel_id: str, what: str) -> None:
        """A kernel that has died meanwhile is none of the caller's concern."""
        if what == "end":
            self.http.delete(f"/api/kernels/{kernel_id}")
        elif what == "kill":
            for process in processes_of(kernel_id):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        else:
            self.http.post(f"/api/kernels/{kernel_id}/{what}", json={})

    def has_ended(self, kernel_id: str) -> bool:
        return self.http.delete(f"/api/kernels/{kernel_id}").status_code in (204, 404)

    def leases(self) -> list[dict[str, Any]]:
        return self.api.get("/leases").raise_for_status().json()["leases"]


def processes_of(kernel_id: str) -> list[psutil.Process]:
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(f"kernel-{kernel_id}.json" in word for word in p.info["cmdline"] or [])
    ]


def workers(leases: list[dict[str, Any]]) -> list[psutil.Process]:
    found = []
    for lease in leases:
        if lease["worker"]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                found.append(psutil.Process(lease["worker"]["pid"]))
    return found


def warm(api: httpx.Client) -> None:
    """Return when a worker has been up: a kernel's start does not wait for PyTorch's import on a busy machine."""
    wish = {"id": str(uuid.uuid4()), "memory_mib": 100, "secret_sha256": "0" * 64}
    state = "QUEUED"
    while state in ("QUEUED", "GRANTED"):  # asking again is harmless
        state = api.post("/leases", params={"wait": 30}, json=wish).raise_for_status().json()["state"]
    assert state == "ACTIVE"
    api.delete(f"/leases/{wish['id']}").raise_for_status()


def granted_by_ledger() -> int:
    ledger = Path(jupyter_data_dir()) / "gpupool" / "ledger.sqlite"
    with sqlite3.connect(ledger) as db:
        return db.execute("SELECT coalesce(sum(used_mib), 0) FROM gpus").fetchone()[0]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_kernels_come_and_go_at_random(
    start_server: Callable[..., Any], kernelspec: Callable[..., str], eventually: Callable[..., Any]
) -> None:
    """Each of the threads is a user who starts a kernel, does things to it, and starts the next one."""
    pytest.importorskip("torch", reason="workers need PyTorch")
    server, api = start_server("--LocalEngine.emulated_count=4", "--ServerApp.kernel_ws_protocol=")
    notebooks, spec, seed = Notebooks(api), kernelspec(num_gpus=1, partial=0.5, grace_s=0.5), random.random()
    until, started, failed = time.monotonic() + SECONDS, [], []

    def user(number: int) -> None:
        choice = random.Random(f"{seed} {number}")
        try:
            while time.monotonic() < until:
                wish = {"num_gpus": choice.choice([0, 1, 1, 2]), "partial": choice.choice([0.1, 0.25, 0.5])}
                kernel_id = notebooks.start(spec, wish)
                started.append(kernel_id)
                for _ in range(choice.randrange(4)):
                    notebooks.do(kernel_id, choice.choice(["restart", "interrupt", "kill"]))
                if choice.random() < 0.7:
                    notebooks.do(kernel_id, "end")
        except Exception as e:
            failed.append(f"{type(e).__name__}: {e}")

    users = [threading.Thread(target=user, args=(number,)) for number in range(KERNELS)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    print(f"{len(started)} kernels, seed {seed}")
    assert not failed, f"seed {seed}: {failed}"
    was = workers(notebooks.leases())
    for kernel_id in started:
        # Jupyter refuses to end one that its restarter is starting at that moment: its user would try again.
        eventually(functools.partial(notebooks.has_ended, kernel_id), "the kernel ends")
    assert eventually(lambda: notebooks.leases() == [], f"seed {seed}: nothing is leased or queued")
    eventually(lambda: not any(map(runs, was)), "no worker is left")
    eventually(lambda: not any(processes_of(k) for k in started), "no kernel is left")
    assert granted_by_ledger() == 0
    used = [gpu["granted_mib"] for gpu in api.get("/pool").json()["servers"][0]["gpus"]]
    assert used == [0, 0, 0, 0]


def test_a_server_that_is_killed_takes_its_kernels_slices_with_it(
    start_server: Callable[..., Any], kernelspec: Callable[..., str], eventually: Callable[..., Any]
) -> None:
    pytest.importorskip("torch", reason="workers need PyTorch")
    server, api = start_server()
    notebooks, spec = Notebooks(api), kernelspec()
    warm(api)
    for _ in range(3):
        notebooks.start(spec, {"num_gpus": 1, "partial": 0.5})
    left = workers(notebooks.leases())
    assert len(left) == 3
    ids = [lease["id"] for lease in notebooks.leases()]
    files = []
    for file in Path(tempfile.gettempdir()).glob("gpupool-kernel-*/lease.json"):
        with contextlib.suppress(FileNotFoundError):  # another server's, whose lease has ended
            files += [file] if any(id in file.read_text() for id in ids) else []
    assert len(files) == 3
    server.send_signal(signal.SIGKILL)
    server.wait(300)
    eventually(lambda: not any(file.parent.exists() for file in files), "its leases' files are removed")
    eventually(lambda: not any(map(runs, left)), "no worker of its kernels is left")
    # On the same ledger: what they held is free, and each MiB is granted once.
    _, api = start_server()
    again = Notebooks(api)
    eventually(lambda: again.leases() == [], "the leases have ended with their server")
    warm(api)
    for _ in range(4):
        again.start(spec, {"num_gpus": 1, "partial": 0.5})
    waiting = again.start(spec, {"num_gpus": 1, "partial": 0.5})
    states = sorted(lease["state"] for lease in again.leases())
    assert states == ["ACTIVE"] * 4 + ["QUEUED"], waiting
    assert [gpu["granted_mib"] for gpu in api.get("/pool").json()["servers"][0]["gpus"]] == [32510, 32510]


NO_TORCH = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Absent())
"""


def test_without_pytorch_all_but_computing_works(
    start_server: Callable[..., Any],
    kernelspec: Callable[..., str],
    eventually: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server, its pool and its kernels run in an environment where ``import torch`` finds nothing."""
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "sitecustomize.py").write_text(NO_TORCH)
    path = [str(tmp_path / "absent"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    server, api = start_server()
    (gpus,) = [s["gpus"] for s in api.get("/pool").json()["servers"]]
    assert [gpu["memory_mib"] for gpu in gpus] == [32510, 32510]
    assert api.get("/history", params={"step": 60}).status_code == 200
    eventually(lambda: "PyTorch" in api.get("/health").text, "its health says what is missing")

    notebooks = Notebooks(api)
    kernel_id = notebooks.start(kernelspec(), {"num_gpus": 1, "partial": 0.5})
    assert processes_of(kernel_id), "the kernel runs, if without its slice"
    eventually(lambda: notebooks.leases() == [], "nothing is held for it")
    ended = api.get("/leases", params={"all": 1}).json()["leases"]
    assert "PyTorch" in json.dumps(ended), ended
    notebooks.do(kernel_id, "end")
    body = {"id": str(uuid.uuid4()), "partial": 0.5, "secret_sha256": "0" * 64}
    answer = api.post("/leases", params={"wait": 30}, json=body).json()
    assert "PyTorch" in json.dumps(answer), answer
