"""Ranks under torchrun, in the shape of PyTorch's tutorials: DDP, resumed from a snapshot, then sharded parameters."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import training
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

ON_CPU = os.environ.get("ON_CPU") == "1"


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    if not ON_CPU:
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if ON_CPU else "nccl")
    places: list[str | None] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(places)
    folder = Path(str(places[0]))
    device = "cpu" if ON_CPU else rank
    model = training.network().to(device)
    wrapped = DistributedDataParallel(model, device_ids=None if ON_CPU else [rank])
    losses = training.train(wrapped, device, rank)
    if rank == 0:
        torch.save(model.state_dict(), folder / "snapshot.pt")
    dist.barrier()
    resumed = training.network().to(device)
    place = "cpu" if ON_CPU else f"cuda:{rank}"
    resumed.load_state_dict(torch.load(folder / "snapshot.pt", map_location=place, weights_only=True))
    losses += training.train(DistributedDataParallel(resumed), device, rank)
    kind = next(resumed.parameters()).device.type
    sharded = fully_shard(resumed)
    losses += training.train(sharded, device, rank)
    checkpoint.save(sharded.state_dict(), checkpoint_id=folder / "sharded")
    other = fully_shard(training.network().to(device))
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=folder / "sharded")
    other.load_state_dict(state)
    weights = [p.full_tensor() for p in other.parameters()]
    if rank == 0:
        training.report(losses=losses, weights=[w.tolist() for w in weights], kind=kind)
    dist.barrier()
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
