"""transformers' Trainer on a leased slice: some steps, a checkpoint, and what is loaded from it.

`make torch-matrix` runs it on each release, with transformers and accelerate in its environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="make torch-matrix installs it")
pytest.importorskip("accelerate", reason="make torch-matrix installs it")

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

set_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (16, 16))]
arguments = TrainingArguments(sys.argv[1], max_steps=3, per_device_train_batch_size=4, logging_steps=1, save_steps=3,
    report_to=[], use_cpu="cpu" in sys.argv, disable_tqdm=True, seed=0, data_seed=0, dataloader_pin_memory=False)
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
assert trainer.model.device.type == ("cpu" if "cpu" in sys.argv else "cuda"), trainer.model.device
print([round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])
again = GPT2LMHeadModel.from_pretrained(sys.argv[1] + "/checkpoint-3")
for (name, one), other in zip(trainer.model.state_dict().items(), again.state_dict().values()):
    assert torch.equal(one.cpu(), other), name
"""


def trained(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [*words, str(folder), *(["cpu"] if len(words) == 3 else [])],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_three_steps_and_a_checkpoint(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", sys.executable, "-c", PROGRAM)
    run = (sys.executable, "-m", "jupyter_gpupool", "run", "-p", "0.5", "--", sys.executable, "-c", PROGRAM)
    assert trained(tmp_path / "leased", *run) == alone
    assert alone.count(",") == 2
