"""A real JupyterHub with its proxy, the pool's service, and servers of users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupyterhub", reason="the extra `test` has JupyterHub")
pytest.importorskip("torch", reason="workers need PyTorch")

from .running import Hub


@pytest.fixture(scope="module")
def new_hub(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> Iterator[Callable[..., Hub]]:
    """``new_hub(more, **arguments)``: ``more`` goes into its configuration, ``arguments`` to ``configure``."""
    made: list[Hub] = []

    def make(more: str = "", **arguments: Any) -> Hub:
        made.append(Hub(tmp_path_factory.mktemp("hub"), project_root, more, **arguments))
        return made[-1]

    yield make
    for hub in made:
        hub.end()
