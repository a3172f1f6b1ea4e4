"""A real JupyterLab, and a real browser that looks at it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ..conftest import PATIENCE_S, USERS_OWN
from ..support.browser import browser, jp_asyncio_loop, jp_server_cleanup, page, window  # noqa: F401  # fixtures
from ..support.ports import free_port


class Lab:
    """A `jupyter lab` with a home of its own, which can be ended and started again at the same address."""

    TOKEN = "of-the-tests"

    def __init__(self, home: Path, root: Path, built: Path, *options: str) -> None:
        self.root = root
        self.port = free_port()
        self._log = root.parent / f"{root.name}.log"
        self._options = options
        # What was built from these sources goes before what is installed.
        (home / "built" / "labextensions").mkdir(parents=True, exist_ok=True)
        if built.is_dir():
            (home / "built" / "labextensions" / "jupyter-gpupool").symlink_to(built)
        folders = {f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("data", "runtime", "config")}
        for folder in folders.values():
            Path(folder).mkdir(mode=0o700, exist_ok=True)
        # No question in the corner whether one would like to have news of Jupyter.
        (home / "config" / "labconfig").mkdir(exist_ok=True)
        (home / "config" / "labconfig" / "page_config.json").write_text(
            '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}'
        )
        self.env = {**os.environ, **folders, "HOME": str(home), "JUPYTER_PATH": str(home / "built")}
        for name in USERS_OWN:
            self.env.pop(name, None)
        self._runtime = home / "runtime"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/lab?token={self.TOKEN}"

    def start(self) -> None:
        """Returns when it answers."""
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                    *("--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0"),
                    f"--IdentityProvider.token={self.TOKEN}",
                    f"--ServerApp.root_dir={self.root}",
                    "--LocalEngine.emulate=always",
                    "--LocalEngine.attach_timeout_s=60",
                    *self._options,
                ],
                cwd=self.root,
                env=self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 300
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"JupyterLab did not start: {self._log.read_text()[-4000:]}"
            time.sleep(0.05)

    def release_everything(self) -> None:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}/gpupool/api/v1/",
            headers={"Authorization": f"token {self.TOKEN}"},
            timeout=PATIENCE_S,
        ) as client:
            for lease in client.get("leases").raise_for_status().json()["leases"]:
                client.delete(f"leases/{lease['id']}").raise_for_status()

    def _answers(self) -> bool:
        assert self._process is not None
        info = self._runtime / f"jpserver-{self._process.pid}.json"
        try:
            said = json.loads(info.read_text())
            httpx.get(f"{said['url']}api", timeout=PATIENCE_S)
        except (OSError, ValueError, httpx.TransportError):  # not there, half written, or not listening yet
            return False
        self.port = said["port"]
        return True

    def run(self, code: str) -> subprocess.Popen[str]:
        """A program beside it, which finds its pool."""
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pytest.fail(f"JupyterLab did not end: {self._log.read_text()[-4000:]}")


@pytest.fixture
def lab(jupyter_home: Path, tmp_path: Path, project_root: Path) -> Iterator[str]:
    """The URL, token and all, of a `jupyter lab` whose pool has the two emulated GPUs."""
    server = Lab(jupyter_home, tmp_path, project_root / "jupyter_gpupool/labextension")
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def one_lab(project_root: Path) -> Iterator[Lab]:
    """One `jupyter lab` for all tests of a module, which leave no lease behind."""
    home = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
    (home / "notebooks").mkdir()
    server = Lab(home, home / "notebooks", project_root / "jupyter_gpupool/labextension")
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
