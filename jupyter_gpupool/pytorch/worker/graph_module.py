"""A checked definition as a module of torch.fx, which inductor compiles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .graph_steps import GraphSteps, refs_as

#: Text that may be a constant of compiled code. Inductor puts it between quotes as it is.
_TEXT = re.compile(r"[A-Za-z0-9_ ,.>-]*")


def module_of(graph: GraphSteps) -> torch.fx.GraphModule:
    """Return a module that computes what the graph does, with its inputs in order, and returns a list.

    Raises NotImplementedError for a graph with an operator that is refused, or that another function replaces here, and
    for one with text that could be more than a constant of compiled code.
    """
    if graph.refused:
        raise NotImplementedError(graph.refused)
    made = torch.fx.Graph()
    values: list[Any] = [made.placeholder(f"x{k}") for k in range(len(graph.inputs))]
    for step in graph.steps:
        if step.replaced:
            raise NotImplementedError(f"{step.name} is emulated")
        if not _is_plain([step.args, step.kwargs]):
            raise NotImplementedError(f"{step.name} has text that is not compiled")
        kwargs = {k: refs_as(v, values) for k, v in step.kwargs.items()}
        values.append(made.call_function(step.kernel, tuple(refs_as(step.args, values)), kwargs))
    made.output([values[slot] for slot, _, _ in graph.returned])
    return torch.fx.GraphModule(torch.nn.Module(), made)


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_TEXT.fullmatch(value))
    if isinstance(value, Mapping):
        return all(_is_plain(v) for pair in value.items() for v in pair)
    return not isinstance(value, Iterable) or isinstance(value, torch.Tensor) or all(map(_is_plain, value))
