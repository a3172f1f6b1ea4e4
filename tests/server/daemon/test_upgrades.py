"""A server that ends, is killed and is upgraded under a training that runs; new certificates; and a clean end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_gpupool.core.models import LeaseState

from ...conftest import PATIENCE_S
from ...support.processes import runs
from .conftest import COMMAND, Server, gpupool
from .unauthenticated import trusting

#: Trains on both slices until the file is there; a line for each step.
TRAINING = """
import pathlib, sys, torch
stop = pathlib.Path(sys.argv[1])
torch.manual_seed(1)
halves = [torch.nn.Linear(64, 64).to("cuda:0"), torch.nn.Linear(64, 1).to("cuda:1")]
optimizer = torch.optim.SGD([p for half in halves for p in half.parameters()], lr=0.01)
x, y = torch.randn(256, 64), torch.randn(256, 1).to("cuda:1")
for step in range(10**6):
    optimizer.zero_grad()
    out = halves[1](torch.tanh(halves[0](x.to("cuda:0"))).to("cuda:1"))
    loss = torch.nn.functional.mse_loss(out, y)
    loss.backward()
    optimizer.step()
    print(step, loss.item(), flush=True)
    if stop.exists():
        break
print("done", sum(p.isfinite().all().item() for half in halves for p in half.parameters()), flush=True)
"""


def upgraded(project_root: Path, folder: Path) -> Path:
    """A directory in which `python -m` finds a later version of the package."""
    shutil.copytree(
        project_root / "jupyter_gpupool",
        folder / "jupyter_gpupool",
        ignore=shutil.ignore_patterns("labextension", "__pycache__"),
    )
    (folder / "jupyter_gpupool" / "_version.py").write_text('__version__ = "99.0.0"\n')
    return folder


def shown(server: Server) -> bytes:
    """The certificate that a new connection is shown."""
    plain = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
    with trusting(server).wrap_socket(plain, server_hostname="localhost") as sock:
        return sock.getpeercert(True) or b""


def test_a_training_outlives_its_server(
    own_server: Server,
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    server, stop = own_server, tmp_path / "stop"
    made = server.bundle(tmp_path / "bundle")
    (tmp_path / "training.py").write_text(TRAINING)
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as o, err.open("wb") as e:
        job = subprocess.Popen(
            [*COMMAND, "run", "-n", "2", "-p", "0.4", "--", sys.executable, tmp_path / "training.py", stop],
            stdin=subprocess.DEVNULL,
            stdout=o,
            stderr=e,
            env={**os.environ, "GPUPOOL_CONFIG_DIR": str(tmp_path / "bundle")},
        )

    def steps() -> int:
        assert job.poll() is None, err.read_text()
        return out.read_text().count("\n")

    def goes_on(what: str) -> None:
        before = steps()
        eventually(lambda: steps() > before + 20, f"it goes on training {what}")

    try:
        goes_on("at first")
        (lease,) = server.administrator().leases()
        assert lease.state is LeaseState.ACTIVE and lease.worker is not None
        before = server.administrator().pool()["version"]

        assert server.stop(signal.SIGTERM) == 0
        goes_on("without its server")
        monkeypatch.chdir(upgraded(project_root, tmp_path / "later"))
        server.start()
        assert server.administrator().pool()["version"] == "99.0.0" != before
        goes_on("with a later server")

        server.stop(signal.SIGKILL)
        goes_on("while its server is dead")
        server.start()
        goes_on("with the next one")
        (same,) = server.administrator().leases()
        assert (same.id, same.state, same.worker) == (lease.id, lease.state, lease.worker)

        stop.touch()
        assert job.wait(300) == 0, err.read_text()
    finally:
        job.kill()
        job.wait()
    assert out.read_text().endswith("done 4\n")
    assert "has ended" not in err.read_text() and "Released GPUs on 1 servers" in err.read_text()
    assert server.administrator().leases() == []
    ended = server.administrator().leases(include_ended=True)
    assert [(found.id, found.state) for found in ended] == [(lease.id, LeaseState.RELEASED)]

    assert server.process is not None
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    eventually(lambda: not any(map(runs, family)), "no process of it is left")
    assert not list((server.folder / "run").glob("*.json"))
    secrets = [
        made["token"],
        (server.folder / "admin" / "client.yaml").read_text().partition("token: ")[2].strip(),
    ]
    for line in server.log.splitlines():
        told = json.loads(line)
        assert {"time", "level", "message"} <= set(told) and told["level"] != "error", line
        assert not any(secret.partition(".")[2] in line for secret in secrets)


def test_new_certificates_are_shown_to_new_connections(
    own_server: Server, eventually: Callable[..., Any]
) -> None:
    from .test_tokens import hold

    server = own_server
    client = server.client(server.token()["token"])
    lease, _, line = hold(client)
    first = shown(server)
    done = gpupool("server", "renew", server.folder)
    assert done.returncode == 0, done.stderr
    second = ssl.PEM_cert_to_DER_cert((server.folder / "server.crt").read_text())
    assert second != first
    eventually(lambda: shown(server) == second, "it is shown")
    assert client.heartbeat(lease.id).state is LeaseState.ACTIVE and line.alive, "what stands goes on"

    # One that makes no sense changes nothing, and is said.
    (server.folder / "server.crt").write_text("no certificate")
    eventually(lambda: "Kept the former certificate" in server.log, "the log says so")
    assert shown(server) == second
    asks = {"GPUPOOL_CONFIG_DIR": str(server.folder / "admin")}
    eventually(lambda: gpupool("health", **asks).returncode == 1, "what watches over it hears of it")
    told = gpupool("health", **asks)
    assert re.search(r"^FAIL +certificate .*cannot be read", told.stdout, re.M), told.stdout
    assert "gpupool server renew" in told.stdout
    line.release()
    client.release(lease.id)


def test_who_may_read_what(own_server: Server) -> None:
    """Of what a server writes, nobody but its user can read anything, wherever its directory is."""
    hold_open = [p for p in [own_server.folder, *own_server.folder.rglob("*")] if not p.is_socket()]
    assert any(re.search("ledger", p.name) for p in hold_open) and any(p.name == "run" for p in hold_open)
    readable = [(p, oct(p.stat().st_mode)) for p in hold_open if p.stat().st_mode & 0o077]
    assert readable == []
