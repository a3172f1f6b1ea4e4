"""What all tests share: a Jupyter of their own, and a way to wait that does not depend on time."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.models import Request

from .support.user_pool import UserPool

pytest_plugins = ["pytest_jupyter.jupyter_server"]

#: What a user's shell may hold that would lead a test to the user's own pool.
USERS_OWN = ("GPUPOOL_LEASE", "GPUPOOL_URL", "GPUPOOL_TOKEN", "GPUPOOL_CONFIG_DIR", "NUM_GPUS", "PARTIAL_GPU")

#: The longest wait for anything, in seconds. It only ends a test that hangs: machines may be as busy as they like.
PATIENCE_S = 300.0

HERE = Path(__file__).parent
#: Seconds of each file's tests one after the other, as measured beside other work; other files are new.
DURATIONS_S: dict[str, float] = json.loads((HERE / "durations.json").read_text())
UNKNOWN_S = 5.0
#: `make test-quick` leaves out files that take longer than this, in seconds.
MAX_QUICK_S = 11.0
#: What a test needs, by its folder or file: the longest prefix counts, and "process" where there is none.
KINDS = {
    "architecture": "unit",
    "core": "unit",
    "docs": "unit",
    "docs/test_tutorials.py": "process",
    "engines/ray": "cluster",
    "gpus": "unit",
    "hub": "cluster",
    "hub/test_browser.py": "browser",
    "kubernetes/test_account_tokens.py": "cluster",
    "kubernetes/test_admission_policy.py": "unit",
    "kubernetes/test_chart.py": "unit",
    "kubernetes/test_chart_in_cluster.py": "cluster",
    "kubernetes/test_cluster.py": "cluster",
    "kubernetes/test_controller.py": "cluster",
    "kubernetes/test_controller_crashes.py": "cluster",
    "kubernetes/test_farm_in_cluster.py": "cluster",
    "kubernetes/test_leadership.py": "unit",
    "kubernetes/test_parked_pods.py": "cluster",
    "kubernetes/test_plan.py": "unit",
    "kubernetes/test_pool_in_cluster.py": "cluster",
    "kubernetes/test_reconcile.py": "unit",
    "kubernetes/test_replaced_tokens.py": "cluster",
    "kubernetes/test_review.py": "unit",
    "kubernetes/test_walk_through.py": "cluster",
    "packaging": "unit",
    "pool": "unit",
    "ui": "browser",
}

#: Whether everything is tried as often, and for as long, as it can bear: `make soak`.
SOAK = os.environ.get("GPUPOOL_SOAK", "") not in ("", "0")


# A machine may be as busy as it likes, in the tests of Hypothesis too, where that is installed.
with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile(
        "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("busy")


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


def kind_of(file: str) -> str:
    """The marker of a test file, by its path below tests/."""
    prefixes = [prefix for prefix in KINDS if file == prefix or file.startswith(f"{prefix}/")]
    return KINDS[max(prefixes, key=len)] if prefixes else "process"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder, and put the longest files first, so that none of them runs alone at the end."""
    duration_s = {}
    for item in items:
        file = item.path.relative_to(HERE).as_posix() if item.path.is_relative_to(HERE) else ""
        duration_s[item] = DURATIONS_S.get(file, UNKNOWN_S)
        item.add_marker(kind_of(file))
        if duration_s[item] > MAX_QUICK_S:
            item.add_marker("slow")
    items.sort(key=lambda item: -duration_s[item])  # a stable sort: the order within a file stays
    skip_without_gpu(items)


def skip_without_gpu(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from jupyter_gpupool.gpus.nvml import nvml_gpus

    if not nvml_gpus("localhost") and not os.environ.get("GPUPOOL_REHEARSE"):
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
def jp_fetch(jp_fetch: Callable[..., Any]) -> Callable[..., Any]:
    """As pytest-jupyter's, with more patience than its twenty seconds."""
    return functools.partial(jp_fetch, request_timeout=PATIENCE_S, connect_timeout=PATIENCE_S)


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """``eventually(condition, "what")``: the condition's first true value.

    Fails, naming what was waited for, when there is none within :data:`PATIENCE_S`.
    """

    def wait(condition: Callable[[], Any], what: str, deadline_s: float = PATIENCE_S) -> Any:
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
    """A real PostgreSQL server (tests/support/postgresql.py); ``ready`` is a database with an empty ledger."""
    from jupyter_gpupool.pool.ledger.ledger import Ledger

    from .support.postgresql import PostgreSQL

    server = PostgreSQL()
    try:
        server.sql("CREATE DATABASE ready")
        Ledger(server.url("ready")).close()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def user_pool() -> Iterator[UserPool]:
    """A pool of two emulated GPUs that many tests use, one after the other (tests/support/user_pool.py)."""
    pool = UserPool()
    yield pool
    pool.stop()


@pytest.fixture
def ask() -> Callable[..., Request]:
    """Build a request; ``partial`` is 1 unless it or ``memory_mib`` is given."""

    def build(**values: Any) -> Request:
        if "memory_mib" not in values:
            values.setdefault("partial", 1.0)
        values.setdefault("id", str(uuid.uuid4()))
        values.setdefault("owner", "ada")
        values.setdefault("secret_sha256", "ab" * 32)
        return Request(**values)

    return build
