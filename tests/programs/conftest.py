"""Programs run on a lease of a pool of their own, as a user's would."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

BESIDE = Path(__file__).with_name("beside")
# Libraries import torchvision where it is installed. Processes that tests start find the file on their path.
runpy.run_path(str(BESIDE / "sitecustomize.py"))


@pytest.fixture(scope="module")
def lease() -> Iterator[object]:
    """Two emulated GPUs at 80 % of their memory, attached to this process."""
    import jupyter_gpupool

    home = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "RUNTIME", "CONFIG"):
            (home / name).mkdir(mode=0o700)
            patch.setenv(f"JUPYTER_{name}_DIR", str(home / name))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(BESIDE), prepend=os.pathsep)
        for name in ("GPUPOOL_LEASE", "GPUPOOL_URL", "GPUPOOL_TOKEN", "NUM_GPUS", "PARTIAL_GPU"):
            patch.delenv(name, raising=False)
        with jupyter_gpupool.attach(num_gpus=2, partial=0.8) as held:
            yield held
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def leased(lease: object) -> dict[str, str]:
    """The environment of a program that holds the lease; each test's own has none."""
    return dict(os.environ)


@pytest.fixture
def record() -> Callable[..., None]:
    """``record(program, compared, result)`` enters a row of docs/reference/programs.md.

    It is of this release of PyTorch, or of that of another framework (``jax="..."``).

    PROGRAMS_RECORD names the JSON file, which `make programs` sets; rows of programs that did not run stay.
    """

    def enter(program: str, *, compared: str, result: str, **release: str) -> None:
        if not (name := os.environ.get("PROGRAMS_RECORD")):
            return
        file = Path(name)
        rows = json.loads(file.read_text()) if file.exists() else {}
        rows[program] = {"compared": compared, "result": result, **(release or {"torch": torch.__version__})}
        file.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")

    return enter
