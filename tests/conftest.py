"""What all tests share: a Jupyter of their own, and a way to wait that does not depend on time."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytest_jupyter.jupyter_server"]

#: What a user's shell may hold that would lead a test to the user's own pool.
USERS_OWN = ("GPUPOOL_LEASE", "GPUPOOL_URL", "GPUPOOL_TOKEN", "GPUPOOL_CONFIG_DIR", "NUM_GPUS", "PARTIAL_GPU")

#: Whether everything is tried as often, and for as long, as it can bear: `make soak`.
SOAK = os.environ.get("GPUPOOL_SOAK", "") not in ("", "0")


def often(usual: int, soak: int) -> int:
    """How often a test tries something: ``usual`` times with all other tests, ``soak`` times in `make soak`."""
    return soak if SOAK else usual


def pytest_configure(config: pytest.Config) -> None:
    """What a shell in the background or nohup ignores, the processes of tests are to notice."""
    if SOAK:
        config.option.markexpr = config.option.markexpr or "soak"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for ignored in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from jupyter_gpupool.devices.nvml import nvml_gpus

    if not nvml_gpus("localhost"):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="NVML finds no GPU on this machine"))


@pytest.fixture(autouse=True)
def jupyter_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the data, configuration and runtime files of this test alone.

    Processes that the test starts inherit it. Its path is short enough for Unix sockets.
    """
    home = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
    for variable, name in (
        ("JUPYTER_DATA_DIR", "data"),
        ("JUPYTER_RUNTIME_DIR", "runtime"),
        ("JUPYTER_CONFIG_DIR", "config"),
    ):
        (home / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(home / name))
    for variable in USERS_OWN:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GPUPOOL_CONFIG_DIR", str(home / "bundle"))  # which nobody has put there
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """``eventually(condition, "what", deadline_s=60)``: the condition's first true value.

    Fails, saying what was waited for, when there is none before the deadline.
    """

    def wait(condition: Callable[[], Any], what: str, deadline_s: float = 60) -> Any:
        deadline = time.monotonic() + deadline_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {deadline_s:g} s: {what}", pytrace=False)
            time.sleep(0.02)
        return value

    return wait


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The root of the source tree."""
    return Path(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    """A real PostgreSQL server (tests/postgresql.py); ``ready`` is a database with an empty ledger."""
    from jupyter_gpupool.pool.ledger import Ledger

    from .postgresql import PostgreSQL

    server = PostgreSQL()
    try:
        server.sql("CREATE DATABASE ready")
        Ledger(server.url("ready")).close()
        yield server
    finally:
        server.remove()
