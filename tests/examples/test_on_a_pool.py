"""The example, unchanged, on slices of a pool: the numbers of the local CPU, digit for digit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.mnist_files import write_mnist

pytest.importorskip("torch", reason="the example needs PyTorch")

TRAIN = [sys.executable, "-m", "jupyter_gpupool.examples.mnist"]
TRAIN += ["--epochs", "1", "--batch-size", "16", "--log-interval", "1"]
NUMBERS = re.compile(r"^(?:Train Epoch|Test set).*$", re.M)


def train(where: Path, device: str, *options: object) -> list[str]:
    """Every loss of a run, as it is printed; on a lease of two slices unless the device is the CPU."""
    pooled = [] if device == "cpu" else [sys.executable, "-m", "jupyter_gpupool", "run", "-n2", "-p0.8", "--"]
    write_mnist(where / "data", train=384, test=64)
    command = [*pooled, *TRAIN, "--device", device, *map(str, options)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = NUMBERS.findall(done.stdout)
    assert len(found) > 20, done.stdout
    return found


def test_losses_are_those_of_the_cpu_digit_for_digit(tmp_path: Path) -> None:
    local, first, second = (train(tmp_path, on, "--dropout", 0) for on in ("cpu", "gpupool:0", "gpupool:1"))
    assert local == first == second


def test_with_dropout_a_seed_gives_the_same_losses_every_time_and_on_either_device(tmp_path: Path) -> None:
    options = ("--dropout", 0.25, "--seed", 7)
    first, again, second = (train(tmp_path, on, *options) for on in ("cuda:0", "cuda:0", "cuda:1"))
    assert first == again == second
