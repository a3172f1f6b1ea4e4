"""The example as a user starts it, on plain PyTorch: no pool anywhere near."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.mnist_files import write_mnist

torch = pytest.importorskip("torch", reason="the example needs PyTorch")

LOSS = re.compile(r"^Train Epoch: (\d+) \[(\d+)/(\d+) \((\d+)%\)\] Loss: (\d+\.\d{6})$", re.M)


def mnist(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "jupyter_gpupool.examples.mnist", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_learns_the_small_digits_and_saves_what_it_learnt(tmp_path: Path) -> None:
    out = mnist(
        "--epochs", 2, "--save-model", "--output-path", tmp_path / "models", "--device", "cpu", cwd=tmp_path
    )
    losses = [float(m[5]) for m in LOSS.finditer(out)]
    assert LOSS.search(out)[3] == "1437" and losses[-1] < 0.5 < losses[0]  # type: ignore[index]
    right, of = re.findall(r"Accuracy: (\d+)/(\d+)", out)[-1]
    assert int(right) / int(of) > 0.9
    state = torch.load(tmp_path / "models" / "mnist_cnn.pt")
    assert state["fc2.weight"].shape == (10, 64)


def test_a_seed_gives_the_same_losses_every_time(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=640, test=64)
    options = ("--data", tmp_path, "--epochs", 1, "--device", "cpu", "--log-interval", 1, "--num-workers", 0)
    first, again, other = (mnist(*options, "--seed", s, cwd=tmp_path) for s in (3, 3, 4))
    assert LOSS.findall(first) == LOSS.findall(again) != LOSS.findall(other)


@pytest.mark.parametrize(("folder", "suffix"), [(".", ".gz"), ("MNIST/raw", "")])
def test_reads_mnist_files(tmp_path: Path, folder: str, suffix: str) -> None:
    write_mnist(tmp_path / folder, train=128, test=20, suffix=suffix)
    out = mnist("--data", tmp_path, "--epochs", 1, "--device", "cpu", "--num-workers", 0, cwd=tmp_path)
    assert [m[3] for m in LOSS.finditer(out)] == ["128"]
    assert "/20 (" in out and "small digits" not in out
