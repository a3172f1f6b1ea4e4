"""The real command as a process of its own, and a pool for it to talk to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient

from ..conftest import PATIENCE_S

COMMAND = [sys.executable, "-m", "jupyter_gpupool"]


class Pool:
    """A `gpupool server` for the tests of one module, in a Jupyter of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            f"JUPYTER_{kind.upper()}_DIR": str(home / kind) for kind in ("data", "runtime", "config")
        }
        self.process = subprocess.Popen(
            [*COMMAND, "server", "--port=0", "--emulate", "--LocalEngine.attach_timeout_s=60"],
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=(home / "log").open("wb"),
        )
        self.address = self._address()
        self.client = PoolClient(self.address.url, self.address.token, timeout_s=PATIENCE_S)

    def _address(self) -> discovery.PoolAddress:
        deadline = time.monotonic() + 300
        before = os.environ.get("JUPYTER_RUNTIME_DIR")
        os.environ["JUPYTER_RUNTIME_DIR"] = self.environment["JUPYTER_RUNTIME_DIR"]
        try:
            while (address := discovery.find()) is None:
                assert self.process.poll() is None, (self.home / "log").read_text()
                assert time.monotonic() < deadline, "the pool did not start"
                time.sleep(0.02)
        finally:
            if before is None:
                del os.environ["JUPYTER_RUNTIME_DIR"]
            else:
                os.environ["JUPYTER_RUNTIME_DIR"] = before
        return address

    def granted(self) -> list[int]:
        """MiB granted of each GPU."""
        return [gpu["granted_mib"] for server in self.client.pool()["servers"] for gpu in server["gpus"]]

    def idle(self) -> bool:
        return not self.client.leases()

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(300)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def module_pool() -> Iterator[Pool]:
    home = Path(tempfile.mkdtemp(prefix="gpupool-cli-"))
    pool = Pool(home)
    yield pool
    pool.stop()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def pool(module_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """The pool that every command of this test finds; without leases before and after."""
    monkeypatch.setenv("GPUPOOL_URL", module_pool.address.url)
    monkeypatch.setenv("GPUPOOL_TOKEN", module_pool.address.token)
    yield module_pool
    for lease in module_pool.client.leases():
        module_pool.client.release(lease.id)


@pytest.fixture
def gpupool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``gpupool("run", "--", "true", NUM_GPUS="2")``: run the command to its end."""

    def run(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=300,
        )

    return run


class Started:
    """A command that runs: what it has said so far can be read at any time."""

    def __init__(self, arguments: tuple[object, ...], folder: Path, environment: dict[str, str]) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={**os.environ, **environment},
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def log(self) -> str:
        return self._err.read_text()

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self) -> int:
        return self.process.wait(300)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(300)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """``start("run", "--", …)``: start the command and go on."""
    started: list[Started] = []

    def begin(*arguments: object, **environment: str) -> Started:
        folder = tmp_path / f"started-{len(started)}"
        folder.mkdir()
        started.append(Started(arguments, folder, environment))
        return started[-1]

    yield begin
    for command in started:
        command.close_stdin()
        if command.process.poll() is None:
            command.kill()


@pytest.fixture
def marked(tmp_path: Path) -> Callable[[], list[psutil.Process]]:
    """The living processes that were started with the variable MARK set to this test's directory."""
    mark = str(tmp_path)

    def find() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    return find


@pytest.fixture
def last_line() -> Callable[[Any], str]:
    """The one line for people with which a command ended, when there was nothing worse."""

    def read(done: subprocess.CompletedProcess[str]) -> str:
        assert "Traceback" not in done.stderr, done.stderr
        lines = [line for line in done.stderr.splitlines() if not line.startswith("[INFO]")]
        assert len(lines) == 1, done.stderr
        return lines[0]

    return read
