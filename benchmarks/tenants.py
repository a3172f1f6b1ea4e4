"""Fifty tenants of one secured server, one of them abusive: what the others' requests and operators take, beside it.

For each kind of abuse a quiet stretch and an abusive one take turns, on one server. ``request`` and ``operator`` are
the 99th percentile of the others in the abusive stretches, divided by that in the quiet ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jupyter_gpupool.client import bundle
from jupyter_gpupool.client.http import PoolClient

from .tenant_program import TOO_MUCH_MIB

TENANTS = 50
#: So many of the others compute; the rest make requests.
PROGRAMS = 2
STRETCH_S = 8.0
ROUNDS = 2
HOST_MEMORY_MIB = 5000
KINDS = ("rate", "queue", "connections", "memory", "graphs")
MOST = 1.5
GOALS = {f"{what}_{kind}": ("<=", MOST) for kind in KINDS for what in ("request", "operator")}


def run() -> dict[str, Any]:
    """Return the ratios by kind of abuse, and the milliseconds behind them."""
    with tempfile.TemporaryDirectory(prefix="gpupool-tenants-") as folder, _server(Path(folder)) as server:
        return _measured(server)


class _Server:
    """A secured server on this machine, with a bundle for each tenant."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.ca = folder / "directory" / "ca.crt"
        words = (folder / "directory" / "admin" / bundle.CLIENT).read_text()
        text = words.partition("token: ")[2].strip()
        self.tokens: list[str] = []
        with PoolClient(f"https://localhost:{port}", text, ca=self.ca.read_text()) as administrator:
            for number in range(TENANTS):
                made = administrator.create_token("a benchmark", 3600.0, owner=f"tenant-{number}")
                self.tokens.append(made["token"])
                archive = folder / f"{number}.tar"
                archive.write_bytes(bundle.tar(made["files"]))
                with tarfile.open(archive) as tar:
                    tar.extractall(folder / f"bundle-{number}")

    def program(self, number: int, kind: str, memory_mib: int) -> subprocess.Popen[str]:
        """A tenant's program, once it is attached."""
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tenant_program", kind, str(memory_mib)],
            env={**os.environ, "GPUPOOL_CONFIG_DIR": str(self.folder / f"bundle-{number}")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "attached\n", f"the program of tenant {number} did not attach: {line}"
        return process

    def load(self, tokens: Sequence[str], kind: str, seconds: float) -> subprocess.Popen[str]:
        """The requests of tenants, which end by themselves."""
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tenant_load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        given = {"host": "localhost", "port": self.port, "ca": str(self.ca), "tokens": list(tokens)}
        process.stdin.write(json.dumps({**given, "kind": kind, "until": time.time() + seconds}))
        process.stdin.close()
        return process


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[_Server]:
    command = [sys.executable, "-m", "jupyter_gpupool", "server"]
    directory = folder / "directory"
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        control, data = one.getsockname()[1], other.getsockname()[1]
    ports = ("--host=127.0.0.1", f"--port={control}", f"--data-port={data}")
    subprocess.run(
        [*command, "init", str(directory), "--address", "localhost", *ports],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    options = [f"--LocalEngine.host_memory_mib={HOST_MEMORY_MIB}"]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen([*command, str(directory), "--emulate", *options], stdout=log, stderr=log)
        try:
            while "data port" not in (folder / "log").read_text():
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.05)
            yield _Server(folder, control)
        finally:
            process.terminate()
            process.wait()


def _measured(server: _Server) -> dict[str, Any]:
    programs = [server.program(1 + k, "steady", 500) for k in range(PROGRAMS)]
    stretches: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    requests: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        for kind in KINDS:
            for abusive in (False, True):
                began, ended, calls = _stretch(server, kind if abusive else "")
                stretches.setdefault((kind, abusive), []).append((began, ended))
                requests += calls
    operators = [call for program in programs for call in _said(program)]
    found: dict[str, Any] = {}
    for kind in KINDS:
        for what, calls in (("request", requests), ("operator", operators)):
            quiet, beside = (_p99_ms(calls, stretches[kind, abusive]) for abusive in (False, True))
            found[f"{what}_{kind}"] = round(beside / quiet, 2)
            found[f"{what}_{kind}_quiet_ms"] = round(quiet, 2)
            found[f"{what}_{kind}_beside_ms"] = round(beside, 2)
    return found


def _stretch(server: _Server, kind: str) -> tuple[float, float, list[tuple[float, float]]]:
    """Let the others make requests, beside that abuse. Return when it began and ended, and the others' calls."""
    abuser: subprocess.Popen[str] | None = None
    if kind in ("memory", "graphs"):
        abuser = server.program(0, kind, TOO_MUCH_MIB + 1000)
    elif kind:
        abuser = server.load(server.tokens[:1], kind, STRETCH_S + 1.0)
    began = time.time()
    steady = server.load(server.tokens[1 + PROGRAMS :], "steady", STRETCH_S)
    assert steady.stdout is not None
    said = json.loads(steady.stdout.read())
    ended = time.time()
    wrong = {
        status: count for status, count in said["statuses"].items() if status not in ("200", "201", "202")
    }
    if wrong:
        raise RuntimeError(f"the others were refused beside {kind or 'nobody'}: {wrong}")
    if abuser is not None and kind in ("memory", "graphs"):
        _said(abuser)
    elif abuser is not None:
        assert abuser.stdout is not None
        abuser.stdout.read()  # its input is closed already, which communicate() would flush
        abuser.wait()
    return began, ended, [tuple(call) for call in said["calls"]]


def _said(program: subprocess.Popen[str]) -> list[tuple[float, float]]:
    """End a program, and return its calls."""
    text, _ = program.communicate()
    return [tuple(call) for call in json.loads(text)]


def _p99_ms(calls: Sequence[tuple[float, float]], stretches: Sequence[tuple[float, float]]) -> float:
    took = [s for at, s in calls if any(began <= at <= ended for began, ended in stretches)]
    return statistics.quantiles(took, n=100)[98] * 1e3
