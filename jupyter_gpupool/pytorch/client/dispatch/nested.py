"""Nested tensors of the jagged layout: PyTorch's own subclass, whose values and offsets are remote tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names

from .dispatcher import Dispatcher, special

aten = torch.ops.aten


def _places(offsets: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of ``count`` rows of values the sequence that it belongs to, and its position there."""
    lengths = offsets[1:] - offsets[:-1]
    sequences = torch.arange(len(lengths), device=offsets.device)
    of = torch.repeat_interleave(sequences, lengths, output_size=count)
    return of, torch.arange(count, device=offsets.device) - offsets[of]


@special(aten._jagged_to_padded_dense_forward.default)
def _to_padded(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    values, (offsets,), (longest,), *padding = args
    of, position = _places(offsets, len(values))
    size = (len(offsets) - 1, longest + 1, *values.shape[1:])
    padded = values.new_full(size, padding[0] if padding else kwargs.get("padding_value", 0.0))
    # What is longer goes to one more column, which is cut off.
    padded[of, position.clamp(max=longest)] = values
    return padded[:, :longest].contiguous()


@special(aten._padded_dense_to_jagged_forward.default)
def _from_padded(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    padded, (offsets,), *total = args
    count = total[0] if total else kwargs.get("total_L")
    of, position = _places(offsets, int(offsets[-1]) if count is None else int(count))
    inside = position < padded.shape[1]
    found = padded[of, position.clamp(max=padded.shape[1] - 1)]
    return found * inside.view(-1, *[1] * (found.dim() - 1))


def refuse_strided(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.nested.nested_tensor`` and the like, which refuse the strided layout on a slice with one line."""

    @functools.wraps(function)
    def call(tensors: Any, *args: Any, layout: Any = None, device: Any = None, **kwargs: Any) -> Any:
        first = tensors[0] if isinstance(tensors, (list, tuple)) and tensors else tensors
        place = device if device is not None else getattr(first, "device", "cpu")
        if layout in (None, torch.strided) and device_names.slice_index(place) is not None:
            raise RuntimeError(
                "nested tensors of the strided layout are not available on a leased GPU: pass layout=torch.jagged"
            )
        return function(tensors, *args, layout=layout, device=device, **kwargs)

    return call


def refuse(*args: Any, **kwargs: Any) -> Any:
    """Raise RuntimeError: a strided nested tensor cannot be moved to a slice."""
    raise RuntimeError(
        "nested tensors of the strided layout are not available on a leased GPU: make them with layout=torch.jagged"
    )


def register() -> torch.library.Library:
    """Refuse to move strided nested tensors to a slice. Returns what keeps this registered."""
    library = torch.library.Library("_", "IMPL")
    if not torch.cuda.device_count():
        library.fallback(refuse, "NestedTensorCUDA")
    return library
