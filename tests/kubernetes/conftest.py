from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, running_cluster
from .running_controller import RunningController


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> Iterator[Cluster]:
    """A control plane with a node, a pool and the webhook (tests/kubernetes/cluster.py)."""
    yield from running_cluster(tmp_path_factory, project_root)


@pytest.fixture(scope="module")
def controller(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    running = RunningController(cluster, tmp_path_factory.mktemp("controller"))
    cluster.plane.wait(running.has_token, "the controller's account")
    running.start()
    yield running
    running.kill()
