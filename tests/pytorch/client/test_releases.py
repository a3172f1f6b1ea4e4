"""Which releases of PyTorch are used, and what is said of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jupyter_gpupool.pytorch.client import session


def test_a_release_that_is_too_old_is_refused(
    start_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(
        RuntimeError, match=r"does not support PyTorch 2\.10\.1\+cpu; install PyTorch 2\.11 or later"
    ):
        session.activate(start_worker().spec)


def test_a_release_that_is_newer_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(session, "_warned", set())
    with pytest.warns(
        UserWarning, match=r"was tested with PyTorch up to 2\.\d+, and this is 2\.99\.0; if something"
    ):
        session._check_release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session._check_release()  # once is enough


def test_this_release_is_among_those_tested() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session._check_release()
