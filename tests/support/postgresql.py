"""A real PostgreSQL for tests, in a directory of its own and on a Unix socket: nobody else can reach it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Debian's place, and those in PATH.
_PLACES = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
_USER = "gpupool"


class PostgreSQL:
    """A server that ends with this process. ``durable`` is what a user's would be; tests do not pull plugs."""

    def __init__(self, durable: bool = False) -> None:
        self.binaries = _binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="gpupool-pg-"))
        self.durable = durable
        self._server: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            shutil.chown(self.folder, *_unprivileged())
        self._run("initdb", "-D", "data", "-U", _USER, "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        self.start()

    def start(self) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "max_connections": "60",
            "shared_buffers": "32MB",
            "fsync": "on" if self.durable else "off",
        }
        words = [f"--{name}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                self._command("postgres", "-D", "data", *words), cwd=self.folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 300
        while subprocess.run(
            self._command("pg_isready", "-q", "-h", self.folder), cwd=self.folder
        ).returncode:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT cuts all sessions; SIGQUIT is a crash."""
        if self._server is not None:
            self._server.send_signal(how)
            try:
                self._server.wait(300)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str) -> str:
        return f"postgresql://{_USER}@/{database}?host={self.folder}"

    @contextlib.contextmanager
    def database(self, template: str = "template1") -> Iterator[str]:
        """The URL of a new database, removed afterwards whoever is still in it."""
        name = f"t{uuid.uuid4().hex[:12]}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def sql(self, statement: str, database: str = "postgres") -> list[tuple]:
        import psycopg

        url = self.url(database)
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(self._command(program, *arguments), cwd=self.folder, check=True, capture_output=True)

    def _command(self, program: str, *arguments: object) -> list[str]:
        command = [str(self.binaries / program), *map(str, arguments)]
        ends = ["--pdeathsig", "SIGQUIT"] if program == "postgres" and os.geteuid() == 0 else []
        if os.geteuid() == 0:
            user, group = _unprivileged()
            command = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *ends, *command]
        return command


def _binaries() -> Path:
    for place in _PLACES:
        if (place / "initdb").is_file():
            return place
    found = shutil.which("initdb")
    if found is None:
        pytest.skip("PostgreSQL's initdb is not here (Debian: apt-get install postgresql)")
    return Path(found).parent


def _unprivileged() -> tuple[str, str]:
    import pwd

    for name, group in (("postgres", "postgres"), ("nobody", "nogroup")):
        with contextlib.suppress(KeyError):
            pwd.getpwnam(name)
            return name, group
    raise RuntimeError("there is no user that PostgreSQL could run as")
