"""Lets ``torch.compile`` and ``torch.export`` trace remote tensors, once the compiler is imported.

The compiler skips programs with tensors that have a dispatch of their own. It traces a remote tensor as a plain
one instead. Whatever the program compiles with inductor, the default, is compiled by :mod:`.backend` if it uses a
slice, and by inductor as without a lease if it does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.cuda import alias
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.after_import import after_import
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import (
    COMPILE_INNER,
    COMPILE_WITH_INDUCTOR,
    CURRENT_STREAM,
    INFER_SUBCLASS_TYPE,
    WRAP,
    pytree,
    rule_map,
)

_COMPILER = "torch._dynamo"
#: The compiler's rule for functions that become a node of the graph.
_IN_GRAPH = "TorchInGraphFunctionVariable"
_torch_inductor = COMPILE_WITH_INDUCTOR.value
_installed = False


def install() -> None:
    """Prepare the compiler when the program imports it, which takes seconds that most programs do not need."""
    global _installed
    if _installed:
        return
    _installed = True
    setattr(*COMPILE_WITH_INDUCTOR, _inductor)
    after_import(_COMPILER, _prepare)


def _inductor(self: Any, graph: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    if uses_slice(graph, inputs):
        from .backend import backend

        return backend(graph, inputs)
    # A backward pass is compiled when it is first called, so the lease is hidden there too.
    inner = COMPILE_INNER.get()
    if not isinstance(inner, _Hiding):
        COMPILE_INNER.set(_Hiding(inner))
    return _Hiding(_torch_inductor)(self, graph, inputs, **kwargs)


class _Hiding:
    """A function that finds no lease: inductor must compile for the CPU as it does without CUDA."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with device_names.hidden():
            return self._function(*args, **kwargs)


def uses_slice(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a tensor among the inputs or within the traced graph is on a slice."""
    if not device_names.count:
        return False
    values = [node.meta.get("example_value") for node in graph.graph.nodes]
    found = pytree.tree_leaves((list(inputs), values))
    devices = {v.device.type for v in found if isinstance(v, torch.Tensor)}
    return not devices.isdisjoint({BACKEND, "cuda"} if device_names.cuda_is_ours else {BACKEND})


def _prepare() -> None:
    torch_wrap, torch_infer_subclass_type = WRAP.get(), INFER_SUBCLASS_TYPE.get()

    def wrap(self: Any, value: Any) -> Any:
        return self.wrap_tensor(value) if type(value) is RemoteTensor else torch_wrap(self, value)

    def infer_subclass_type(value: Any) -> Any:
        return None if type(value) is RemoteTensor else torch_infer_subclass_type(value)

    def current_stream(device: torch.device) -> Any:
        return torch.accelerator.current_stream(device)

    for place in CURRENT_STREAM:
        place.set(current_stream)
    WRAP.set(wrap)
    INFER_SUBCLASS_TYPE.set(infer_subclass_type)
    # The compiler takes these for functions of PyTorch's core. They are Python, whatever was imported first.
    rules = rule_map.get()()
    for owner, name in alias.replaced():
        function = vars(owner).get(name)
        if isinstance(function, FunctionType) and getattr(rules.get(function), "__name__", "") == _IN_GRAPH:
            del rules[function]
