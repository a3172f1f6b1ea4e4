"""Two processes of a lease that exchange tensors, beside two of the CPU with gloo."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 2
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]

#: What ranks do: called with the device and the rank, returns what this rank finds.
Parts = Mapping[str, Callable[[str, int], dict[str, Any]]]


def elements(shape: tuple[int, ...], dtype: Any, rank: int) -> Any:
    generator = torch.Generator().manual_seed(rank * 1000 + len(shape))
    return (torch.rand(shape, generator=generator) * 9 + 1).to(dtype)


def digits(t: Any) -> Any:
    """All that there is to a tensor, for another process."""
    return str(t.dtype), list(t.shape), t.detach().cpu().reshape(-1).view(torch.uint8).tolist()


def _rank(spec: Any, folder: str, rank: int, parts: Parts, answers: Any) -> None:
    torch.set_num_threads(1)
    device = "cpu" if spec is None else f"cuda:{rank}"
    if spec is not None:
        from jupyter_gpupool.pytorch.client import session

        session.activate(spec)
        torch.cuda.set_device(rank)
    backend = "gloo" if spec is None else "nccl"
    found = {}
    for name, part in parts.items():
        dist.init_process_group(backend, init_method=f"file://{folder}/{name}", rank=rank, world_size=SIZE)
        assert dist.get_backend() == backend
        found[name] = part(device, rank)
        dist.destroy_process_group()
    answers.put((rank, found))


def run(spec: Any, folder: Path, parts: Parts) -> dict[int, Any]:
    """What each rank finds in each part. ``folder`` is made, for the ranks to meet."""
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(spec, str(folder), rank, parts, answers)) for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found


def compare(spec: Any, folder: Path, parts: Parts) -> None:
    """Fail where ranks of the lease do not find what ranks on the CPU do, digit for digit."""
    expected, found = run(None, folder / "cpu", parts), run(spec, folder / "slices", parts)
    for rank, part in itertools.product(range(SIZE), parts):
        assert found[rank][part].keys() == expected[rank][part].keys()
        for name, value in expected[rank][part].items():
            assert found[rank][part][name] == value, f"{part}: {name}"
