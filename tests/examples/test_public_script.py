"""PyTorch's own public MNIST script, unmodified, on a slice of a pool.

The script is not ours to carry: PYTORCH_EXAMPLES names a clone of github.com/pytorch/examples. A stand-in
supplies the few names of torchvision that it imports, over scikit-learn's digits.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the script needs PyTorch")

CLONE = os.environ.get("PYTORCH_EXAMPLES", "")
pytestmark = pytest.mark.skipif(not CLONE, reason="PYTORCH_EXAMPLES names no clone of pytorch/examples")

#: The last commits with each form of the script.
FORMS = {"torch.accelerator": "d0b7e37", "torch.cuda": "0f0c913"}


@pytest.fixture(params=FORMS)
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    told = subprocess.run(
        ["git", "-C", CLONE, "show", f"{FORMS[request.param]}:mnist/main.py"], capture_output=True
    )
    assert told.returncode == 0 and request.param.encode() in told.stdout, told.stderr
    file = tmp_path / "mnist" / "main.py"
    file.parent.mkdir()
    file.write_bytes(told.stdout)
    return file


def run(script: Path, mib: int) -> subprocess.CompletedProcess[str]:
    pooled = [sys.executable, "-m", "jupyter_gpupool", "run", "-m", str(mib), "--"]
    return subprocess.run(
        [*pooled, sys.executable, str(script), "--epochs", "4", "--save-model"],
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent / "standin")},
        capture_output=True,
        text=True,
    )


def test_it_learns(script: Path) -> None:
    done = run(script, 2000)
    assert done.returncode == 0, done.stderr
    losses = [float(n) for n in re.findall(r"Test set: Average loss: (\d+\.\d+)", done.stdout)]
    right, of = re.findall(r"Accuracy: (\d+)/(\d+)", done.stdout)[-1]
    assert len(losses) == 4 and losses[-1] < losses[0] and int(right) / int(of) > 0.7, done.stdout
    assert (script.parent / "mnist_cnn.pt").stat().st_size > 4_000_000


def test_it_is_the_slice_that_it_runs_on(script: Path) -> None:
    done = run(script, 5)
    assert done.returncode == 1 and "OutOfMemoryError" in done.stderr
