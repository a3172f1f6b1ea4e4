"""A checked definition as a module of torch.fx, which inductor compiles."""

from __future__ import annotations

from typing import Any

import torch

from .graph_steps import GraphSteps, refs_as


def module_of(graph: GraphSteps) -> torch.fx.GraphModule:
    """Return a module that computes what the graph does, with its inputs in order, and returns a list.

    Raises NotImplementedError for a graph with an operator that is refused, or that another function replaces here.
    """
    if graph.refused:
        raise NotImplementedError(graph.refused)
    made = torch.fx.Graph()
    values: list[Any] = [made.placeholder(f"x{k}") for k in range(len(graph.inputs))]
    for step in graph.steps:
        if step.replaced:
            raise NotImplementedError(f"{step.name} is emulated")
        kwargs = {k: refs_as(v, values) for k, v in step.kwargs.items()}
        values.append(made.call_function(step.kernel, tuple(refs_as(step.args, values)), kwargs))
    made.output([values[slot] for slot, _, _ in graph.returned])
    return torch.fx.GraphModule(torch.nn.Module(), made)
