"""A graph's steps made one by inductor, in the background; they run one by one till then, and where it cannot be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .steps import GraphSteps, refs_as

#: A graph that is called less often than this is not worth the compiler's time.
CALLS = 3

#: One at a time: a worker's processor time belongs to its operators.
_one = threading.Lock()


class Fusing:
    """Runs a graph, and has it compiled once it has shown to be wanted again."""

    def __init__(self, graph: GraphSteps) -> None:
        self.graph = graph
        self._fused: Callable[..., Any] | None = None
        self._wanted = graph.wants_inductor
        if self._wanted is None:
            self._wanted = not graph.device.spec.emulated
        self._left = CALLS
        #: what became of it, for those who look: "", "compiling", "compiled" or why not
        self.state = ""

    def run(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """As :meth:`GraphSteps.run`."""
        fused = self._fused
        if fused is not None:
            return list(fused(*tensors))
        results = self.graph.run(tensors)
        if self._wanted:
            self._left -= 1
            if not self._left:
                self._wanted = False
                self.state = "compiling"
                examples = [t.clone() for t in tensors]
                threading.Thread(target=self._compile, args=(examples,), name="inductor", daemon=True).start()
        return results

    def _compile(self, examples: list[torch.Tensor]) -> None:
        try:
            module = self._module()
            with _one, torch.inference_mode():
                from torch._inductor import config

                settings: dict[str, Any] = {"fallback_random": True}
                config.compile_threads = 1  # no pool of processes that would outlive us
                fused = torch.compile(module, fullgraph=True, dynamic=False, options=settings)
                fused(*examples)
            self._fused = fused
            self.state = "compiled"
        except Exception as e:  # no compiler here, or a graph that it does not take
            self.state = f"{type(e).__name__}: {e}"

    def _module(self) -> torch.fx.GraphModule:
        graph = torch.fx.Graph()
        values: list[Any] = [graph.placeholder(f"x{k}") for k in range(len(self.graph.inputs))]
        for step in self.graph.steps:
            if step.replaced:
                raise NotImplementedError(f"{step.name} is emulated")
            kwargs = {k: refs_as(v, values) for k, v in step.kwargs.items()}
            values.append(graph.call_function(step.kernel, tuple(refs_as(step.args, values)), kwargs))
        graph.output([values[slot] for slot, _, _ in self.graph.returned])
        return torch.fx.GraphModule(torch.nn.Module(), graph)
