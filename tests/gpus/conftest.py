"""A stand-in for the NVIDIA driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..support.recorded_nvml import Recorded, install


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], Recorded]:
    """``recorded(devices)``: pynvml's functions answer as written down for some machines."""
    return lambda devices: install(monkeypatch, devices)
