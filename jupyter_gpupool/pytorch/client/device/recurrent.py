"""Sends a recurrent network (LSTM, GRU, RNN) as one operator, and its backward pass as another, as cuDNN runs them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.dispatch.dispatcher import Dispatcher, special
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor, TensorLayout, geometry
from jupyter_gpupool.pytorch.protocol.recurrent import GATES, OPAQUE, RNN, RNN_BACKWARD, Misfit, plan
from jupyter_gpupool.pytorch.torch_internals.client import forward_ad

#: Operator → its mode. ``input`` takes padded sequences, ``data`` packed ones.
OPERATORS: dict[Any, str] = {
    getattr(getattr(torch.ops.aten, mode), overload): mode for mode in GATES for overload in ("input", "data")
}

_plan = functools.lru_cache(maxsize=4096)(plan)

_TWICE = (
    "the backward pass of a recurrent network with dropout cannot be differentiated on a leased GPU: it would need "
    "the same random numbers again. To run it step by step, disable cuDNN in the forward pass: "
    "with torch.backends.cudnn.flags(enabled=False)"
)


class _Call(NamedTuple):
    """One call: what ``gpupool::rnn`` takes, and the operator with its own arguments."""

    op: Any
    args: tuple[Any, ...]
    mode: str
    tensors: tuple[RemoteTensor, ...]
    #: how many of the tensors are initial states
    states: int
    batch_sizes: tuple[int, ...] | None
    #: has_biases, num_layers, dropout, train, bidirectional, batch_first
    options: tuple[Any, ...]
    layouts: tuple[TensorLayout, ...]
    saved: TensorLayout

    def send(self, d: Dispatcher, differentiated: list[bool]) -> list[RemoteTensor]:
        """Run the forward pass. If a tensor is differentiated, the last result is what the worker saved."""
        n = 1 + self.states
        lists = list(self.tensors[1:n]), list(self.tensors[n:])
        args = (self.mode, self.tensors[0], self.batch_sizes, *lists, *self.options, differentiated)
        layouts = (*self.layouts, self.saved) if differentiated else self.layouts
        results: list[RemoteTensor] = d.call_predicted(RNN, args, layouts)
        return results


def _understood(op: Any, args: tuple[Any, ...]) -> _Call | None:
    """The call, or None for one that is an error, or that has tensors elsewhere than on one slice."""
    mode = OPERATORS[op]
    batch_sizes: tuple[int, ...] | None = None
    if op._overloadname == "data":
        input, sizes, hx, params, *options = args
        if type(sizes) is not torch.Tensor or sizes.device.type != "cpu" or sizes.dim() != 1:
            return None
        batch_sizes = tuple(sizes.tolist())
        options.append(False)
    else:
        input, hx, params, *options = args
    states = list(hx) if mode == "lstm" else [hx]
    tensors = (input, *states, *params)
    if any(type(t) is not RemoteTensor for t in tensors):
        return None
    layouts = [t._geometry for t in tensors]
    first = layouts[0]
    if not first.dtype.is_floating_point or any(
        g.dtype != first.dtype or g.index != first.index for g in layouts
    ):
        return None
    n = 1 + len(states)
    has_biases, num_layers, _, _, bidirectional, batch_first = options
    try:
        sizes = _plan(
            *(mode, first.size, batch_sizes, tuple(g.size for g in layouts[1:n])),
            *(tuple(g.size for g in layouts[n:]), has_biases, num_layers, bidirectional, batch_first),
        )
    except Misfit:
        return None
    bytes_saved = sizes.saved_elements * first.dtype.itemsize
    return _Call(
        *(op, args, mode, tensors, len(states), batch_sizes, tuple(options)),
        (_laid_out(first, sizes.output, batch_first), *(_laid_out(first, size) for size in sizes.states)),
        geometry((bytes_saved,), (1,), 0, OPAQUE, first.index, first.cuda),
    )


def _laid_out(like: TensorLayout, size: tuple[int, ...], transposed: bool = False) -> TensorLayout:
    """A layout of that size as recurrent networks return it: with ``batch_first``, steps are outermost in memory."""
    if transposed:
        batch, steps, features = size
        stride: tuple[int, ...] = (features, batch * features, 1)
    else:
        steps, stride = 1, ()
        for length in reversed(size):
            stride = (steps, *stride)
            steps *= length
    return geometry(size, stride, 0, like.dtype, like.index, like.cuda)


class _Recurrent(torch.autograd.Function):
    """Its arguments are the call and the call's tensors, its results those of the operator."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: RemoteTensor) -> Any:
        ctx.call = call._replace(tensors=(), args=())  # autograd keeps the tensors, or frees them
        ctx.set_materialize_grads(False)
        d = attachment.dispatcher(call.saved.index)
        *outputs, saved = call.send(d, list(ctx.needs_input_grad[1:]))
        ctx.save_for_backward(*tensors, *outputs, saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors
        inputs = tensors[: -len(grads) - 1]
        needed = ctx.needs_input_grad[1:]
        differentiated = [t for t, wanted in zip(inputs, needed) if wanted]
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(inputs))
        if torch.is_grad_enabled():
            found = iter(_step_by_step(call, inputs, differentiated, grads))
        else:
            batch_first = call.options[-1]
            layouts = [
                _laid_out(t._geometry, t._geometry.size, batch_first and t is inputs[0])
                for t in differentiated
            ]
            d = attachment.dispatcher(call.saved.index)
            found = iter(d.call_predicted(RNN_BACKWARD, (tensors[-1], list(grads)), layouts))
        return (None, *(next(found) if wanted else None for wanted in needed))


def _step_by_step(call: _Call, inputs: Any, differentiated: Any, grads: Any) -> Any:
    """The gradients by the operators that the network is composed of, so that they have gradients too."""
    _, num_layers, dropout, train, _, _ = call.options
    if dropout and train and num_layers > 1:
        raise RuntimeError(_TWICE)
    n = 1 + call.states
    states = list(inputs[1:n]) if call.mode == "lstm" else inputs[1]
    lengths: tuple[torch.Tensor, ...] = ()
    options = call.options
    if call.batch_sizes is not None:
        lengths, options = (torch.tensor(call.batch_sizes),), call.options[:-1]
    outputs = call.op.decompose(inputs[0], *lengths, states, list(inputs[n:]), *options)
    results, given = zip(*((out, grad) for out, grad in zip(outputs, grads) if grad is not None))
    return torch.autograd.grad(results, differentiated, given, create_graph=True, materialize_grads=True)


def _run(op: Any, *args: Any) -> Any:
    # cuDNN's switch, as with CUDA: without it, the network is run step by step.
    call = _understood(op, args) if torch.backends.cudnn.enabled and forward_ad._current_level < 0 else None
    if call is None:
        return op.decompose(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in call.tensors):
        return _Recurrent.apply(call, *call.tensors)
    return tuple(call.send(attachment.dispatcher(call.saved.index), []))


def _without_autograd(op: Any, d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _run(op, *args, **kwargs)


def register() -> torch.library.Library:
    """Register the networks with PyTorch. The caller must keep the library: it is unregistered with it."""
    library = torch.library.Library("aten", "IMPL")
    for op in OPERATORS:
        library.impl(op.name().removeprefix("aten::"), functools.partial(_run, op), "AutogradPrivateUse1")
        special(op)(functools.partial(_without_autograd, op))  # inference mode has no autograd
    return library
