"""A secured server of its own for a test, as an administrator sets one up: by the commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.client import bundle
from jupyter_gpupool.client.http import PoolClient

from ...conftest import PATIENCE_S
from ...support.ports import free_ports

pytest.importorskip("torch", reason="workers need PyTorch")

COMMAND = [sys.executable, "-m", "jupyter_gpupool"]
#: Many leases are held by nobody here, and a busy machine takes its time with the others.
PATIENT = "--LocalEngine.attach_timeout_s=600"


def gpupool(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command, run to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        timeout=300,
    )


@dataclass
class Server:
    """A directory that `gpupool server init` wrote, and the daemon that serves it."""

    folder: Path
    port: int
    data_port: int
    process: subprocess.Popen | None = None
    clients: list[PoolClient] = field(default_factory=list)
    options: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def ca(self) -> str:
        return (self.folder / "ca.crt").read_text()

    @property
    def log(self) -> str:
        return (self.folder.parent / "log").read_text()

    def start(self) -> None:
        """Returns when it answers."""
        with (self.folder.parent / "log").open("ab") as log:
            before = self.log.count("data port")
            self.process = subprocess.Popen(
                [*COMMAND, "server", str(self.folder), "--emulate", PATIENT, *self.options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 300
        while self.log.count("data port") <= before:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)

    def end(self) -> None:
        for client in self.clients:
            client.close()
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def stop(self, sig: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(sig)
        return self.process.wait(300)

    def client(self, token: str) -> PoolClient:
        made = PoolClient(self.url, token, timeout_s=PATIENCE_S, ca=self.ca)
        self.clients.append(made)
        return made

    def administrator(self) -> PoolClient:
        text = (self.folder / "admin" / bundle.CLIENT).read_text()
        return self.client(text.partition("token: ")[2].strip())

    def token(
        self, description: str = "a test", expires_s: float | None = 3600.0, **fields: Any
    ) -> dict[str, Any]:
        return self.administrator().create_token(description, expires_s, **fields)

    def bundle(self, folder: Path, **fields: Any) -> dict[str, Any]:
        """Unpacks a new token's bundle there; the token."""
        made = self.token(**fields)
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder.parent / f"{made['id']}.tar"
        archive.write_bytes(bundle.tar(made["files"]))
        with tarfile.open(archive) as tar:
            tar.extractall(folder)
        return made


def initialised(parent: Path, *addresses: str, options: tuple[str, ...] = ()) -> Server:
    folder, ports = parent / "directory", free_ports(2)
    words = [word for address in addresses or ("localhost", "127.0.0.1") for word in ("--address", address)]
    ports_said = ("--host=127.0.0.1", f"--port={ports[0]}", f"--data-port={ports[1]}")
    done = gpupool("server", "init", folder, *words, *ports_said)
    assert done.returncode == 0, done.stderr
    return Server(folder, *ports, options=options)


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``new_server(*addresses, options=…)``: initialised, not started."""
    made: list[Server] = []

    def make(*addresses: str, options: tuple[str, ...] = ()) -> Server:
        parent = tmp_path / f"server-{len(made)}"
        parent.mkdir()
        made.append(initialised(parent, *addresses, options=options))
        return made[-1]

    yield make
    for server in made:
        server.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that answers, for all tests of a module."""
    made = initialised(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.end()


@pytest.fixture
def own_server(new_server: Callable[..., Server]) -> Server:
    """One that answers, for this test alone."""
    made = new_server()
    made.start()
    return made
