"""What the engines' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.certificates import Certificates


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)
