"""Programs in the style of JAX's libraries train on a slice, and learn what they learn on the CPU, bit by bit."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("library", ["optax", "equinox", "numpyro", "flax"])
def test_a_library_trains_as_on_the_cpu(run_program: Callable[..., Any], worker: Any, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; `make test` installs it, Flax `make programs`")
    done = run_program("libraries.py", worker, library)
    assert done.returncode == 0, done.stderr
    on_the_slice, num_bytes, is_the_same = json.loads(done.stdout)
    assert on_the_slice and num_bytes >= 500 and is_the_same
