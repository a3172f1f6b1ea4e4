"""Compiles a graph by inductor in the background. Until then, or if that fails, its steps run one by one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.worker import inductor_settings

from .compile_helper import CompileHelper, NotCompiled
from .graph_module import module_of
from .graph_steps import GraphSteps

#: A graph is compiled after so many calls: a rarer one is not worth the time.
MIN_CALLS = 3

#: Why this process compiles nothing; empty if it may.
_refusal = ""
#: What compiles graphs in place of this process.
_helper: CompileHelper | None = None


def refuse(why: str) -> None:
    """Let this process compile no graph, for that reason: it could start no compiler."""
    global _refusal
    _refusal = why


def ask(helper: CompileHelper) -> None:
    """Have graphs compiled by a process outside, because this one may start no compiler."""
    global _helper
    _helper = helper


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
        if self._compile_first and _helper is None:
            self._compile_first = False
            self._compile([t.clone() for t in tensors])
        fused = self._fused
        if fused is not None:
            return list(fused(*tensors))
        results = self.graph.run(tensors)
        if self._compile_first:  # not before its operators have accepted their arguments
            self._compile_first = False
            self._begin([])
        if self._wanted:
            self._left -= 1
            if not self._left:
                self._wanted = False
                self._begin([t.clone() for t in tensors] if _helper is None else [])
        return results

    def _begin(self, examples: list[torch.Tensor]) -> None:
        self.state = "compiling"
        threading.Thread(target=self._compile, args=(examples,), name="inductor", daemon=True).start()

    def _compile(self, examples: list[torch.Tensor]) -> None:
        if _helper is not None:
            self._have_compiled(_helper)
            return
        if _refusal:
            self.state = _refusal
            return
        try:
            module = module_of(self.graph)
            with _compiling, torch.inference_mode():
                settings: dict[str, Any] = {"fallback_random": True}
                inductor_settings.get().compile_threads = 1  # no processes that would outlive the worker
                fused = torch.compile(module, fullgraph=True, dynamic=False, options=settings)
                fused(*examples)
            self._fused = fused
            self.state = "compiled"
        except Exception as e:  # no compiler here, or one that does not support the graph
            self.state = f"{type(e).__name__}: {e}"

    def _have_compiled(self, helper: CompileHelper) -> None:
        try:
            compiled = helper.compiled(self.graph, _compiling)
        except NotCompiled as e:
            self.state = str(e)
            return

        def run(*tensors: torch.Tensor) -> list[Any]:
            if not self.graph.is_apart(tensors):
                return self.graph.run(tensors)
            try:
                return compiled(tensors)
            except RuntimeError as e:
                if not self.graph.is_repeatable:
                    raise
                # One of the operators may say what is wrong, or free memory.
                self._fused, self.state = None, f"{type(e).__name__}: {e}"
                return self.graph.run(tensors)

        self._fused = run
        self.state = "compiled"
