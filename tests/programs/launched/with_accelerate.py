"""Hugging Face accelerate's loop, below ``accelerate launch`` or, with `notebook`, its launcher of cells."""

from __future__ import annotations

import os
import sys

import torch
import training
from accelerate import Accelerator, notebook_launcher
from torch import nn


def main() -> None:
    accelerator = Accelerator(cpu=os.environ.get("ON_CPU") == "1")
    model = training.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, training.loader())
    losses = []
    for _ in range(3):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    if accelerator.is_main_process:
        training.report(
            losses=losses,
            weights=training.weights(model),
            kind=accelerator.device.type,
            world=accelerator.num_processes,
        )
    accelerator.end_training()


if __name__ == "__main__":
    if sys.argv[1] == "notebook":
        notebook_launcher(main, num_processes=training.RANKS, use_port=sys.argv[2])
    else:
        main()
