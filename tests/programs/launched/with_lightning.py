"""Lightning's Trainer on two devices, with the strategy that the first argument names."""

from __future__ import annotations

import sys

import lightning as L
import torch
import training
from torch import nn


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = training.network()

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


net = Net()
run = L.Trainer(
    max_epochs=3,
    devices=training.RANKS,
    strategy=sys.argv[1],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
run.fit(net, training.loader())
if run.is_global_zero:
    training.report(
        weights=training.weights(net),
        kind=run.strategy.root_device.type,
        world=run.world_size,
        steps=run.global_step,
    )
