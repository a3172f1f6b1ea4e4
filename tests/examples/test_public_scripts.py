"""Scripts of PyTorch's public examples that download nothing, unmodified, on a slice of a pool.

PYTORCH_EXAMPLES names a clone of github.com/pytorch/examples; a text of ours stands where its corpus would be.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the scripts need PyTorch")

CLONE = os.environ.get("PYTORCH_EXAMPLES", "")
COMMIT = "77f55b9"
pytestmark = pytest.mark.skipif(not CLONE, reason="PYTORCH_EXAMPLES names no clone of pytorch/examples")

TEXT = "the pool lends a slice of a card to a notebook and takes it back when the notebook has ended\n" * 60


@pytest.fixture
def example(tmp_path: Path) -> Callable[..., Path]:
    def fetch(name: str, *files: str) -> Path:
        for file in files:
            told = subprocess.run(
                ["git", "-C", CLONE, "show", f"{COMMIT}:{name}/{file}"], capture_output=True
            )
            assert told.returncode == 0, told.stderr
            (tmp_path / file).write_bytes(told.stdout)
        return tmp_path

    return fetch


def run(folder: Path, *command: str, mib: int = 2000) -> str:
    pooled = [sys.executable, "-m", "jupyter_gpupool", "run", "-m", str(mib), "--", sys.executable]
    standin = str(Path(__file__).parent / "standin")
    done = subprocess.run(
        [*pooled, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": standin},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("model", ["LSTM", "GRU", "RNN_TANH", "Transformer"])
def test_word_language_model(example: Callable[..., Path], model: str) -> None:
    folder = example("word_language_model", "main.py", "model.py", "data.py", "generate.py")
    (folder / "corpus").mkdir()
    for name in ("train", "valid", "test"):
        (folder / "corpus" / f"{name}.txt").write_text(TEXT)
    small = ["--emsize", "16", "--nhid", "16", "--nlayers", "1", "--batch_size", "4", "--nhead", "2"]
    said = run(folder, "main.py", "--accel", "--data", "corpus", "--epochs", "6", "--model", model, *small)
    found = [float(x) for x in re.findall(r"valid ppl +(\d+\.\d+)", said)]
    assert len(found) == 6 and found[-1] < found[0], said
    said = run(
        folder, "generate.py", "--accel", "--data", "corpus", "--words", "12", "--checkpoint", "model.pt"
    )
    assert (folder / "generated.txt").read_text().split()


def test_regression(example: Callable[..., Path]) -> None:
    assert "Learned function" in run(example("regression", "main.py"), "main.py")


def test_time_sequence_prediction(example: Callable[..., Path]) -> None:
    pytest.importorskip("matplotlib", reason="the script draws its predictions with matplotlib")
    folder = example("time_sequence_prediction", "generate_sine_wave.py", "train.py")
    run(folder, "generate_sine_wave.py")
    assert "test loss" in run(folder, "train.py", "--steps", "1")


def test_mnist_with_a_recurrent_net(example: Callable[..., Path]) -> None:
    said = run(example("mnist_rnn", "main.py"), "main.py", "--accel", "--epochs", "3")
    losses = [float(x) for x in re.findall(r"Average loss: (\d+\.\d+)", said)]
    assert len(losses) == 3 and losses[-1] < losses[0], said
