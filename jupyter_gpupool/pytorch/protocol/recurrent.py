"""Recurrent networks as one call: what client and worker agree on.

``gpupool::rnn`` runs ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu`` whole, as cuDNN does.
Its results are theirs and, if a gradient is needed, a last one that stands for what the worker saved.
``gpupool::rnn_backward`` takes that one. It returns the gradients of the tensors that were marked as differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Size = tuple[int, ...]

_library = torch.library.Library("gpupool", "DEF")
_library.define(
    "rnn(str mode, Tensor input, int[]? batch_sizes, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, "
    "float dropout, bool train, bool bidirectional, bool batch_first, bool[] differentiated) -> Tensor[]",
    tags=torch.Tag.nondeterministic_seeded,
)
_library.define("rnn_backward(Tensor saved, Tensor?[] grads) -> Tensor[]")

RNN = torch.ops.gpupool.rnn.default
RNN_BACKWARD = torch.ops.gpupool.rnn_backward.default

#: The dtype of what a worker saved: PyTorch has no operators for it.
OPAQUE = torch.bits8

#: Mode → how many gates the rows of a weight are for.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Misfit(ValueError):
    """The arguments do not fit each other."""


class Plan(NamedTuple):
    """The sizes of a call's results."""

    output: Size
    states: tuple[Size, ...]
    #: about what cuDNN reserves for the backward pass
    saved_elements: int


def plan(
    mode: str,
    input: Size,
    batch_sizes: Sequence[int] | None,
    hx: Sequence[Size],
    params: Sequence[Size],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> Plan:
    """The sizes of the results, from those of the tensors. Raises :class:`Misfit`.

    ``input`` is (steps, batch, features), or (batch, steps, features) with ``batch_first``. With ``batch_sizes``,
    the number of rows of each step, it is (their sum, features). Parameters are ordered as in
    ``nn.LSTM.all_weights``, one layer and direction after the other.
    """
    if mode not in GATES:
        raise Misfit(f"there is no recurrent network {mode!r}")
    rows, batch, steps = _rows(input, batch_sizes, batch_first)
    gates, directions = GATES[mode], 2 if bidirectional else 1
    cells = num_layers * directions
    if not 0 < cells <= len(params) or len(params) % cells or any(len(p) not in (1, 2) for p in params):
        raise Misfit(f"{len(params)} parameters for {num_layers} layers of {directions} directions")
    per_cell, plain = len(params) // cells, 4 if has_biases else 2
    projected = per_cell == plain + 1 and mode == "lstm"
    if not (projected or per_cell == plain) or len(params[1]) != 2:
        raise Misfit(f"{per_cell} parameters for each layer and direction, where {plain} are needed")
    hidden, returned = params[0][0] // gates, params[1][1]
    if not projected and returned != hidden:
        raise Misfit(f"a state of {returned} features for {hidden} hidden ones")
    for cell in range(cells):
        features = input[-1] if cell < directions else returned * directions
        expected: list[Size] = [(gates * hidden, features), (gates * hidden, returned)]
        expected += [(gates * hidden,)] * 2 if has_biases else []
        expected += [(returned, hidden)] if projected else []
        found = list(params[cell * per_cell : (cell + 1) * per_cell])
        if found != expected:
            raise Misfit(f"parameters of sizes {found}, where {expected} are needed")
    states: tuple[Size, ...] = ((cells, batch, returned),)
    if mode == "lstm":
        states = (*states, (cells, batch, hidden))
    if tuple(hx) != states:
        raise Misfit(f"initial states of sizes {list(hx)}, where {list(states)} are needed")
    if not rows or not hidden or not returned:
        raise Misfit("an empty input or state")
    output = (*input[:-1], returned * directions)
    saved = cells * rows * (gates * hidden + 2 * hidden) + (num_layers - 1) * rows * directions * returned
    return Plan(output, states, saved)


def _rows(input: Size, batch_sizes: Sequence[int] | None, batch_first: bool) -> tuple[int, int, int]:
    """How many rows, sequences and steps an input has."""
    if batch_sizes is None:
        if len(input) != 3:
            raise Misfit(f"an input of {len(input)} dimensions, where 3 are needed")
        batch, steps = (input[0], input[1]) if batch_first else (input[1], input[0])
        return batch * steps, batch, steps
    if batch_first or len(input) != 2:
        raise Misfit("a packed input that is not (rows, features)")
    falling = all(a >= b for a, b in zip(batch_sizes, batch_sizes[1:]))
    if not batch_sizes or not falling or batch_sizes[-1] < 1 or sum(batch_sizes) != input[0]:
        raise Misfit(f"batch sizes that do not fall, or that do not add up to {input[0]} rows")
    return input[0], batch_sizes[0], len(batch_sizes)
