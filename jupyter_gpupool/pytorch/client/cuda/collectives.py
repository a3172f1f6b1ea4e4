"""Copies between the slices of one lease for ``nn.DataParallel``: what ``torch.nn.parallel.comm`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.torch_internals.client import COLLECTIVES


def _device(index: int, like: torch.Tensor) -> torch.device:
    return torch.device("cpu") if index == -1 else torch.device(like.device.type, index)


def broadcast(tensor: torch.Tensor, devices: Sequence[int]) -> list[torch.Tensor]:
    """A copy of ``tensor`` on each device."""
    if not tensor.is_cuda and not getattr(tensor, "is_gpupool", False):
        tensor = tensor.to(torch.device("cuda", devices[0]))
    return [tensor.to(_device(d, tensor)) for d in devices]


def broadcast_out(tensor: torch.Tensor, out: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy ``tensor`` into each tensor of ``out``, which have its shape."""
    for target in out:
        target.copy_(tensor)
    return list(out)


def broadcast_coalesced(
    tensors: Sequence[torch.Tensor], devices: Sequence[int], buffer_size: int
) -> list[list[torch.Tensor]]:
    """Copies of all ``tensors`` on each device, one by one: the worker copies within one machine.

    The first device gets the tensors themselves, without their history, as with CUDA.
    """
    for t in tensors:
        if t.get_device() != devices[0]:
            raise RuntimeError("all tensors must be on devices[0]")
    return [[t.detach() if d == devices[0] else t.to(_device(d, t)) for t in tensors] for d in devices]


def scatter(
    tensor: torch.Tensor,
    devices: Sequence[int],
    chunk_sizes: Sequence[int] | None,
    dim: int,
    streams: Any = None,
) -> tuple[torch.Tensor, ...]:
    """Parts of ``tensor`` along ``dim``, one on each device; of ``chunk_sizes``, else of equal sizes."""
    parts = tensor.split(chunk_sizes, dim) if chunk_sizes else tensor.chunk(len(devices), dim)
    kind = tensor.device.type if tensor.device.type != "cpu" else "cuda"
    return tuple(part.contiguous().to(torch.device(kind, d)) for part, d in zip(parts, devices))


def scatter_out(
    tensor: torch.Tensor, out: Sequence[torch.Tensor], dim: int, streams: Any = None
) -> tuple[torch.Tensor, ...]:
    """Copy parts of ``tensor`` along ``dim`` into the tensors of ``out``, which decide the sizes."""
    for target, part in zip(out, tensor.split([o.size(dim) for o in out], dim), strict=True):
        target.copy_(part)
    return tuple(out)


def gather(tensors: Sequence[torch.Tensor], dim: int, destination: int | None) -> torch.Tensor:
    """The ``tensors`` joined along ``dim`` on one device: ``destination``, -1 for the CPU, else the first's."""
    place = tensors[0].device if destination is None else _device(destination, tensors[0])
    return torch.cat([t.to(place) for t in tensors], dim)


def gather_out(tensors: Sequence[torch.Tensor], out: torch.Tensor, dim: int) -> torch.Tensor:
    """Join the ``tensors`` along ``dim`` in ``out``."""
    return torch.cat([t.to(out.device) for t in tensors], dim, out=out)


def alias(patches: Patches) -> None:
    """Replace the functions of PyTorch's CUDA build that its Python code calls; there is no NCCL here."""
    patches.set(torch.cuda.nccl, "is_available", lambda tensors: False)
    ours = (broadcast, broadcast_out, broadcast_coalesced, scatter, scatter_out, gather, gather_out)
    for place, function in zip(COLLECTIVES, ours, strict=True):
        patches.set(*place, function)
