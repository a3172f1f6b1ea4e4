"""Compiles a graph by inductor in the background. Until then, or if that fails, its steps run one by one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.worker import inductor_settings

from .graph_steps import GraphSteps, refs_as

#: A graph is compiled after so many calls: a rarer one is not worth the time.
MIN_CALLS = 3

#: Why this process compiles nothing; empty if it may.
_refusal = ""


def refuse(why: str) -> None:
    """Let this process compile no graph, for that reason: it could start no compiler."""
    global _refusal
    _refusal = why


#: One compilation at a time: the processor is needed for operators.
_compiling = threading.Lock()


@contextlib.contextmanager
def while_nothing_is_compiled() -> Iterator[bool]:
    """Let no compilation begin meanwhile, which measures and synchronizes. False if there is one, or one begins."""
    free = _compiling.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            _compiling.release()


class FusedGraph:
    """Runs a graph, and compiles it after some calls."""

    def __init__(self, graph: GraphSteps) -> None:
        self.graph = graph
        self._fused: Callable[..., Any] | None = None
        self._wanted = graph.wants_inductor
        if self._wanted is None:
            self._wanted = graph.device.compiles_graphs
        self._left = MIN_CALLS
        #: whether it is compiled before its next call, as it was where its state comes from
        self._compile_first = False
        #: "", "compiling", "compiled", or why it could not be compiled
        self.state = ""

    @property
    def compiled(self) -> bool:
        """Whether calls run compiled code, now or once it has been compiled again."""
        return self._fused is not None or self._compile_first

    @property
    def is_settled(self) -> bool:
        """Whether the next call runs as the last one did."""
        return not self._wanted and not self._compile_first and self.state != "compiling"

    @property
    def calls_left(self) -> int:
        """The calls until it is compiled; 0 if it will not be."""
        if self._wanted:
            return self._left
        return 1 if self.state == "compiling" else 0

    def resume(self, calls_left: int, compiled: bool) -> None:
        """Go on where another graph of the same definition was, see :attr:`compiled` and :attr:`calls_left`."""
        self._wanted = calls_left > 0 and not compiled
        self._left = calls_left
        self._compile_first = compiled

    def run(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Run the graph, as :meth:`GraphSteps.run`."""
        if self._compile_first:
            self._compile_first = False
            self._compile([t.clone() for t in tensors])
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
        if _refusal:
            self.state = _refusal
            return
        try:
            module = self._module()
            with _compiling, torch.inference_mode():
                settings: dict[str, Any] = {"fallback_random": True}
                inductor_settings.get().compile_threads = 1  # no processes that would outlive the worker
                fused = torch.compile(module, fullgraph=True, dynamic=False, options=settings)
                fused(*examples)
            self._fused = fused
            self.state = "compiled"
        except Exception as e:  # no compiler here, or one that does not support the graph
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
