"""A fresh machine: a server is set up, somebody elsewhere is given a bundle, and trains there on two of its GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import COMMAND
from .network import Host, two_hosts

STAMP = r"\[INFO\] \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of somebody who has just been given an account there."""
    home.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPUPOOL_", "JUPYTER_"))}
    return {**kept, "HOME": str(home), "TMPDIR": str(home), **more}


def run(host: Host, home: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        host.command(*words),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=home,
        env=environment(home, **more),
        timeout=300,
    )


def reaches(client: Host, home: Path, address: str, port: int) -> bool:
    attempt = f"import socket; socket.create_connection(({address!r}, {port}), 20).close()"
    done = run(client, home, sys.executable, "-c", attempt)
    assert done.returncode == 0 or "ConnectionRefusedError" in done.stderr, done.stderr
    return done.returncode == 0


def test_a_fresh_machine(
    hosts: tuple[Host, Host], tmp_path: Path, jupyter_home: Path, eventually: Callable[..., Any]
) -> None:
    here, there = hosts
    here.admits_only(56001, 55001)
    root, ada = jupyter_home / "root", jupyter_home / "ada"
    directory = tmp_path / "etc"

    made = run(
        here,
        root,
        *COMMAND,
        *("server", "init", directory, "--address", here.address),
    )
    assert made.returncode == 0, made.stderr
    administrator = {"GPUPOOL_CONFIG_DIR": str(directory / "admin")}

    log = tmp_path / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            here.command(*COMMAND, "server", directory, "--emulate", "--LocalEngine.attach_timeout_s=60"),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment(root),
        )
    other = subprocess.Popen(
        here.command(sys.executable, "-m", "http.server", "8000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: server.poll() is not None or "data port" in log.read_text(), "the server is up")
        assert server.poll() is None, log.read_text()

        created = run(
            here,
            root,
            *COMMAND,
            *("token", "create", "--description", "ada", "--output", tmp_path / "ada.tar"),
            **administrator,
        )
        assert created.returncode == 0, created.stderr

        ada.mkdir()
        bundle = ada / ".gpupool"
        bundle.mkdir()
        assert run(there, ada, "tar", "-xf", tmp_path / "ada.tar", "-C", bundle).returncode == 0
        (bundle / "servers.conf").chmod(0o444)  # as in an image, or a mounted secret
        bundle.chmod(0o555)

        eventually(lambda: reaches(here, root, "127.0.0.1", 8000), "something else listens there")
        assert not reaches(there, ada, here.address, 8000)
        assert reaches(there, ada, here.address, 56001) and reaches(there, ada, here.address, 55001)

        training = ["-m", "jupyter_gpupool.examples.mnist", "--epochs", "1", "--num-workers", "0"]
        used = run(
            there,
            ada,
            *COMMAND,
            *("run", "-n", 2, "-p", 0.8, "--", sys.executable, *training),
            OMP_NUM_THREADS="1",
        )
        assert used.returncode == 0, used.stderr
        assert "Training on cuda: Tesla V100-PCIE-32GB (emulated)" in used.stdout
        losses = [float(x) for x in re.findall(r"Train Epoch: 1 \[.*\] Loss: ([\d.]+)", used.stdout)]
        assert len(losses) > 2 and losses[-1] < losses[0]

        host = re.escape(here.address)
        story = re.fullmatch(
            "\n".join(
                [
                    rf"{STAMP}Query server {host}:56001 to claim client id: (?P<id>{UUID})",
                    rf"{STAMP}Query server {host}:56001 gpu availability",
                    rf"{STAMP}Query server health status",
                    rf"{STAMP}Choosing GPUs from server list \[{host}:56001\]",
                    rf"{STAMP}Requesting GPUs \[0 1\] with 26008 MiB of memory from server 0, "
                    r"with version (?P<v>[\w.+]+)\.\.\.",
                    rf"(?:{STAMP}Waiting for the GPU server to start the worker\n)*Requested resources:",
                    rf"Server List: {host}:56001",
                    r"Client idle timeout: 0 min",
                    rf"{STAMP}Locked 2 GPUs with partial memory 0\.8, configuration saved to "
                    r"'(?P<config>/.*/gpupool\w+)'",
                    rf"{STAMP}2 of these GPUs are emulated.*",
                    rf"{STAMP}Running client command '.*jupyter_gpupool\.examples\.mnist.*' on 2 GPUs, "
                    "with the following servers:",
                    rf"{STAMP}{host} 55001 (?P=id) 56001 (?P=v)",
                    rf"{STAMP}Releasing GPUs from config file '(?P=config)'\.\.\.",
                    rf"{STAMP}Released GPUs on 1 servers and removed generated config file '(?P=config)'",
                ]
            )
            + "\n",
            "".join(line for line in used.stderr.splitlines(True) if "failing a health check" not in line),
        )
        assert story, used.stderr

        # Nothing is left over, neither with the client nor on the server.
        assert not Path(story["config"]).exists()
        eventually(lambda: not there.processes(), "no process of the client is left")
        listed = run(here, root, *COMMAND, "leases", "--json", **administrator)
        assert listed.returncode == 0 and json.loads(listed.stdout) == {"leases": []}, listed.stderr
        state = directory / "run"
        eventually(lambda: not [*state.glob("*.json"), *state.glob("*.door")], "no file of a worker is left")
        for kept in (bundle, directory / "admin"):
            secret = re.search(r"token: \w+\.(\S+)", (kept / "client.yaml").read_text())
            assert secret and secret[1] not in log.read_text()

        server.send_signal(signal.SIGTERM)
        assert server.wait(300) == 0
        other.kill()
        other.wait()
        eventually(lambda: not here.processes(), "every process of the server has ended")
    finally:
        for process in (server, other):
            process.kill()
            process.wait()
        deadline = time.monotonic() + 300
        while (left := [*here.processes(), *there.processes()]) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
