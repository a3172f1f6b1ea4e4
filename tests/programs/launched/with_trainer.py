"""Hugging Face's Trainer, in the processes of torchrun."""

from __future__ import annotations

import os
import tempfile

import torch
import training
from torch import nn
from transformers import Trainer, TrainingArguments


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = training.network()

    def forward(self, x, labels):
        out = self.net(x)
        return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x, self.y = training.data()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n):
        return {"x": self.x[n], "labels": self.y[n]}


with tempfile.TemporaryDirectory(prefix="gpupool-test-") as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=os.environ.get("ON_CPU") == "1",
    )
    net = Net()
    trainer = Trainer(model=net, args=arguments, train_dataset=Rows())
    trainer.train()
    if trainer.is_world_process_zero():
        training.report(
            losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
            weights=training.weights(net),
            kind=arguments.device.type,
            world=arguments.world_size,
        )
