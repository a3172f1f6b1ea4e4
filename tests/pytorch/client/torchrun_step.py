"""A step of two ranks under torchrun: ``torchrun … torchrun_step.py END``, where END is ends, raises or killed."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import nn

#: Elements of a tensor of 4 MiB.
LARGE = 1 << 20


def main(end: str) -> None:
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    model = nn.parallel.DistributedDataParallel(nn.Linear(64, 64).cuda(), device_ids=[rank])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(4, 64, device="cuda")).square().mean().backward()
    optimizer.step()
    x, got = torch.full((LARGE,), float(rank), device="cuda"), torch.zeros(LARGE, device="cuda")
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.irecv, got, 1 - rank), dist.P2POp(dist.isend, x, 1 - rank)]
    )
    for work in works:
        work.wait()
    assert got[-1].item() == 1 - rank
    if end != "ends":
        dist.isend(x, 1 - rank, tag=1)  # nobody receives it
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 1:
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("as programs do")
        dist.recv(got, 1, tag=2)
        torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
