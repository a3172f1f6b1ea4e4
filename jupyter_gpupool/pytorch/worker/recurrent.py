"""Runs recurrent networks as one call, and keeps what their backward pass needs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.recurrent import OPAQUE, plan
from jupyter_gpupool.pytorch.torch_internals.worker import run_backward

# Parameters arrive one by one. cuDNN packs them at each call, and advises a method of the client's module.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")

# What torch.autograd.grad calls (outputs, gradients, keep the graph, create one, inputs, allow unused ones). That
# one imports sympy to compare shapes, which takes more than a second.
_gradients = run_backward

_NO_STORAGE = torch.empty(0).untyped_storage()


class Saved:
    """A forward pass that waits for its backward pass. Client and worker count it as ``size`` bytes."""

    def __init__(
        self, size: int, outputs: Sequence[torch.Tensor], differentiated: Sequence[torch.Tensor]
    ) -> None:
        self.shape = (size,)
        self.dtype = OPAQUE
        self.outputs = outputs
        self.differentiated = differentiated

    def untyped_storage(self) -> torch.UntypedStorage:
        """An empty storage: results are compared with those of inputs."""
        return _NO_STORAGE


def rnn(
    mode: str,
    input: torch.Tensor,
    batch_sizes: list[int] | None,
    hx: list[torch.Tensor],
    params: list[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    differentiated: list[bool],
) -> list[Any]:
    """Run ``gpupool::rnn``, see protocol/recurrent.py.

    Raises ValueError for sizes that do not fit: kernels would read outside of the tensors.
    """
    tensors = [input, *hx, *params]
    sizes = plan(
        *(
            mode,
            tuple(input.shape),
            batch_sizes,
            [tuple(t.shape) for t in hx],
            [tuple(t.shape) for t in params],
        ),
        *(has_biases, num_layers, bidirectional, batch_first),
    )
    if len({(t.dtype, t.device) for t in tensors}) > 1 or not input.dtype.is_floating_point:
        raise ValueError(f"{mode} needs floating-point tensors of one dtype on one device")
    if differentiated and len(differentiated) != len(tensors):
        raise ValueError(f"{len(differentiated)} marks for {len(tensors)} tensors")
    function = getattr(torch, mode)
    options = (params, has_biases, num_layers, dropout, train, bidirectional)
    if not any(differentiated):
        initial = tuple(hx) if mode == "lstm" else hx[0]
        return _apart(_call(function, input, batch_sizes, initial, options, batch_first))
    # What a session creates cannot be saved by autograd, and changes of its tensors are the client's concern.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_plain(t).requires_grad_(needed) for t, needed in zip(tensors, differentiated)]
        n = 1 + len(hx)
        initial = tuple(leaves[1:n]) if mode == "lstm" else leaves[1]
        outputs = _call(function, leaves[0], batch_sizes, initial, (leaves[n:], *options[1:]), batch_first)
        results = _apart(_plain(t) for t in outputs)
    saved = Saved(
        sizes.saved_elements * input.itemsize, outputs, tuple(itertools.compress(leaves, differentiated))
    )
    return [*results, saved]


def rnn_backward(saved: Saved, grads: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Run ``gpupool::rnn_backward``: the gradients of the differentiated tensors, any number of times."""
    if not isinstance(saved, Saved) or len(grads) != len(saved.outputs):
        raise ValueError("gradients without the forward pass that they belong to")
    with torch.inference_mode(False):
        given = [(out, _plain(grad)) for out, grad in zip(saved.outputs, grads) if grad is not None]
        if any(out.shape != grad.shape or out.dtype != grad.dtype for out, grad in given):
            raise ValueError("gradients of other sizes or dtypes than the results that they belong to")
        if not given:
            raise ValueError("no gradients at all")
        outputs, given_grads = zip(*given)
        found = _gradients(
            outputs, given_grads, True, False, saved.differentiated, True, accumulate_grad=False
        )
        return _apart(
            torch.zeros_like(t) if grad is None else grad for t, grad in zip(saved.differentiated, found)
        )


def _call(
    function: Any,
    input: torch.Tensor,
    batch_sizes: list[int] | None,
    states: Any,
    options: tuple[Any, ...],
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    if batch_sizes is None:
        results: tuple[torch.Tensor, ...] = function(input, states, *options, batch_first)
    else:
        results = function(input, torch.tensor(batch_sizes), states, *options)
    return results


def _plain(t: torch.Tensor) -> torch.Tensor:
    """A tensor on the same memory that autograd can save."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


def _apart(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, each on memory of its own: cuDNN's gradients are parts of one buffer, some of the same part."""
    seen: set[int] = set()
    results = []
    for t in tensors:
        storage = t.untyped_storage()
        if storage._cdata in seen or storage.nbytes() > t.numel() * t.itemsize:
            t = t.clone()
        seen.add(storage._cdata)
        results.append(t)
    return results
