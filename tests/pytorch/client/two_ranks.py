"""Processes of a lease that exchange tensors, beside as many of the CPU with gloo. Two, where nothing is said."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
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


def _rank(
    spec: Any, folder: str, port: int, rank: int, slices: Sequence[int], parts: Parts, answers: Any
) -> None:
    torch.set_num_threads(1)
    device = "cpu" if spec is None else f"cuda:{slices[rank]}"
    if spec is not None:
        from jupyter_gpupool.pytorch.client import session
        from jupyter_gpupool.pytorch.client.dispatch import attachment

        if attachment.current() is None:  # it is not in the environment
            session.activate(spec)
        torch.cuda.set_device(slices[rank])
    backend = "gloo" if spec is None else "nccl"
    found = {}
    for name, part in parts.items():
        meeting: dict[str, Any] = {"init_method": f"file://{folder}/{name}"}
        if port:
            meeting = {"store": dist.PrefixStore(name, dist.TCPStore("127.0.0.1", port))}
        dist.init_process_group(backend, rank=rank, world_size=len(slices), **meeting)
        assert dist.get_backend() == backend
        found[name] = part(device, rank)
        dist.destroy_process_group()
    answers.put((rank, found))


def run(
    spec: Any, folder: Path, parts: Parts, slices: Sequence[int] = range(SIZE), port: int = 0
) -> dict[int, Any]:
    """What each rank finds in each part.

    ``folder`` is made, for the ranks to meet; ``slices``: each rank's; ``port``: a TCPStore's, to meet there instead.
    """
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(spec, str(folder), port, rank, slices, parts, answers))
        for rank in range(len(slices))
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
