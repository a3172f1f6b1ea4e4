from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_gpupool.core.models import Server, WorkerAddress
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest, path: Path) -> Iterator[str]:
    """Of an empty database, once in each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{path}"
        return
    with request.getfixturevalue("postgresql").database("ready") as url:
        yield url


@pytest.fixture
def ledger(db_url: str) -> Iterator[Ledger]:
    ledger = Ledger(db_url)
    yield ledger
    ledger.close()


@pytest.fixture
def servers() -> list[Server]:
    """One server with two emulated V100s of 32510 MiB."""
    return [Server("one", "127.0.0.1", emulated_gpus("one"))]


@pytest.fixture
def manager(ledger: Ledger, clock: Clock, servers: list[Server]) -> Manager:
    manager = Manager(ledger, clock)
    manager.set_servers(servers)
    return manager


@pytest.fixture
def worker() -> WorkerAddress:
    return WorkerAddress("127.0.0.1", 4711, 12345, 999.5)
