"""Copies between the slices of one lease, as ``nn.DataParallel`` makes them: ``torch.nn.parallel.comm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .patches import Patches


def _device(index: int, like: torch.Tensor) -> torch.device:
    return torch.device("cpu") if index == -1 else torch.device(like.device.type, index)


def broadcast(tensor: torch.Tensor, devices: Sequence[int]) -> list[torch.Tensor]:
    if not tensor.is_cuda and not getattr(tensor, "is_gpupool", False):
        tensor = tensor.to(torch.device("cuda", devices[0]))
    return [tensor.to(_device(d, tensor)) for d in devices]


def broadcast_out(tensor: torch.Tensor, out: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    for target in out:
        target.copy_(tensor)
    return list(out)


def broadcast_coalesced(
    tensors: Sequence[torch.Tensor], devices: Sequence[int], buffer_size: int
) -> list[list[torch.Tensor]]:
    """Nothing to gain by coalescing: the worker copies within one machine."""
    for t in tensors:
        if t.get_device() != devices[0]:
            raise RuntimeError("all tensors must be on devices[0]")
    # The first device's are the tensors themselves, without their history, as with CUDA.
    return [[t.detach() if d == devices[0] else t.to(_device(d, t)) for t in tensors] for d in devices]


def scatter(
    tensor: torch.Tensor,
    devices: Sequence[int],
    chunk_sizes: Sequence[int] | None,
    dim: int,
    streams: Any = None,
) -> tuple[torch.Tensor, ...]:
    parts = tensor.split(chunk_sizes, dim) if chunk_sizes else tensor.chunk(len(devices), dim)
    kind = tensor.device.type if tensor.device.type != "cpu" else "cuda"
    return tuple(part.contiguous().to(torch.device(kind, d)) for part, d in zip(parts, devices))


def scatter_out(
    tensor: torch.Tensor, out: Sequence[torch.Tensor], dim: int, streams: Any = None
) -> tuple[torch.Tensor, ...]:
    for target, part in zip(out, tensor.split([o.size(dim) for o in out], dim), strict=True):
        target.copy_(part)
    return tuple(out)


def gather(tensors: Sequence[torch.Tensor], dim: int, destination: int | None) -> torch.Tensor:
    place = tensors[0].device if destination is None else _device(destination, tensors[0])
    return torch.cat([t.to(place) for t in tensors], dim)


def gather_out(tensors: Sequence[torch.Tensor], out: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([t.to(out.device) for t in tensors], dim, out=out)


def alias(patches: Patches) -> None:
    """Provide what PyTorch's Python code expects of its CUDA half; NCCL knows no leased GPUs."""
    patches.set(torch.cuda.nccl, "is_available", lambda tensors: False)
    for function in (
        broadcast,
        broadcast_out,
        broadcast_coalesced,
        scatter,
        scatter_out,
        gather,
        gather_out,
    ):
        patches.set(torch._C, f"_{function.__name__}", function)
