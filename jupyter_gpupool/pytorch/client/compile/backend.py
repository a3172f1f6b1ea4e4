"""``torch.compile(…, backend="gpupool")``: what the compiler traced becomes one command for each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.client import aot_autograd, make_boxed_func, partition

from .graphs import Graph

#: The options of the backend, and their defaults.
OPTIONS = {"inductor": None, "cudagraphs": True}


class UnknownOption(ValueError):
    """``torch.compile(options=…)`` names an option that this backend does not have."""


def backend(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], *, options: Any = None, **ignored: Any
) -> Callable[..., Any]:
    """Compile a traced part of a program: each forward and each backward call of it becomes one command.

    With ``options={"inductor": True}`` the worker compiles the part by inductor after some calls, with False
    never. By default it does so on a real GPU. ``options={"cudagraphs": False}`` keeps a real GPU from recording the
    part as a CUDA graph. Raises :class:`UnknownOption`.
    """
    chosen = {**OPTIONS, **(options or {})}
    unknown = sorted(set(chosen) - set(OPTIONS))
    if unknown:
        raise UnknownOption(f"the gpupool backend has no option {unknown[0]!r}; it has {', '.join(OPTIONS)}")
    for node in gm.graph.nodes:
        node.meta.pop("tensor_dict", None)  # it would keep the traced tensors alive

    box = make_boxed_func.get()

    def compiled(traced: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        return box(Graph(traced, chosen["inductor"], chosen["cudagraphs"] is not False))

    return aot_autograd.get()(
        fw_compiler=compiled,
        bw_compiler=compiled,
        partition_fn=partition.get(),
        keep_inference_input_mutations=True,
    )(gm, inputs)
