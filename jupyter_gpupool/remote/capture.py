"""``torch.compile(…, backend="gpupool")``: how PyTorch's compiler gets to see remote tensors.

The compiler traces with fake tensors. A remote tensor is one nearly by itself (a geometry without
memory), but it is of a type with a dispatch of its own, which the compiler passes over. Here it is
told that for this backend, and no other, such a tensor is a plain one of the ``gpupool`` device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo import trace_rules
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.variables import builder
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.meta_utils import MetaTensorDescriber

from . import names, pinning
from .graphs import Graph
from .names import BACKEND
from .tensor import RemoteTensor, Storage

#: What ``options=`` may say, and what it is when it says nothing.
OPTIONS = {"inductor": None}


class UnknownOption(ValueError):
    """``torch.compile(options=…)`` names something that this backend does not have."""


def backend(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], *, options: Any = None, **ignored: Any
) -> Callable:
    """Compile one traced piece of a program: one message for each call of it, forward and backward.

    ``options={"inductor": True}`` has the worker compile the piece with inductor after some calls,
    False never; by default it does on a real GPU. Raises :class:`UnknownOption`.
    """
    chosen = {**OPTIONS, **(options or {})}
    unknown = sorted(set(chosen) - set(OPTIONS))
    if unknown:
        raise UnknownOption(f"the gpupool backend has no option {unknown[0]!r}; it has {', '.join(OPTIONS)}")
    for node in gm.graph.nodes:
        node.meta.pop("tensor_dict", None)  # it would keep the tensors that were traced alive

    def compiled(traced: torch.fx.GraphModule, examples: Any) -> Callable:
        return make_boxed_func(Graph(traced, chosen["inductor"]))

    return aot_autograd(
        fw_compiler=compiled,
        bw_compiler=compiled,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )(gm, inputs)


def _is_ours(compiler: Any) -> bool:
    """Whether that is this backend, wrapped as PyTorch wraps one."""
    for _ in range(8):
        if compiler is backend:
            return True
        for name in ("_torchdynamo_orig_backend", "compiler_fn", "__wrapped__"):
            inner = getattr(compiler, name, None)
            if inner is not None:
                compiler = inner
                break
        else:
            return False
    return False


# -- what the compiler is told

_twins: weakref.WeakKeyDictionary[Storage, Any] = weakref.WeakKeyDictionary()
_describing = threading.RLock()


def _wrap(self: Any, value: Any) -> Any:
    if type(value) is RemoteTensor and _is_ours(self.tx.output.compiler_fn):
        return self.wrap_tensor(value)
    return _torch_wrap(self, value)


def _infer_subclass_type(value: Any) -> Any:
    return None if type(value) is RemoteTensor else _torch_infer_subclass_type(value)


def _describe_tensor(self: Any, t: torch.Tensor, **kwargs: Any) -> Any:
    if type(t) is not RemoteTensor:
        return _torch_describe_tensor(self, t, **kwargs)
    with _describing:
        before = RemoteTensor.untyped_storage
        RemoteTensor.untyped_storage = _twin  # type: ignore[assignment, method-assign]
        try:
            return _torch_describe_tensor(self, t, **kwargs)
        finally:
            RemoteTensor.untyped_storage = before  # type: ignore[method-assign]


def _twin(t: RemoteTensor) -> Any:
    """A storage without bytes, the same one for all tensors on it; the device's own answer copies every byte."""
    twin = _twins.get(t._storage)
    if twin is None:
        blank = torch.empty(t._storage.nbytes, dtype=torch.uint8, device="meta")
        twin = _twins[t._storage] = blank.untyped_storage()
    return twin


def _new_fake(cls: type, fake_mode: Any, elem: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    """``cuda`` and ``gpupool`` are one device, and only the second has autograd here."""
    device = torch.device(device)
    if names.says_cuda(device):
        device = torch.device(BACKEND, names.slice_index(device) or 0)
    return _torch_new_fake(cls, fake_mode, elem, device, *args, **kwargs)


_torch_wrap: Any = builder.VariableBuilder._wrap
_torch_infer_subclass_type: Any = builder.infer_subclass_type
_torch_describe_tensor: Any = MetaTensorDescriber.describe_tensor
_torch_new_fake: Any = FakeTensor.__new__


def _install() -> None:
    builder.VariableBuilder._wrap = _wrap  # type: ignore[method-assign]
    builder.infer_subclass_type = _infer_subclass_type
    MetaTensorDescriber.describe_tensor = _describe_tensor  # type: ignore[method-assign]
    FakeTensor.__new__ = staticmethod(_new_fake)  # type: ignore[assignment, method-assign]
    # The compiler's table of PyTorch's functions was made with ours in their place, or without.
    rules = trace_rules.get_torch_obj_rule_map()
    for name in pinning.FACTORIES:
        function = getattr(torch, name)
        function = getattr(function, "__wrapped__", function)
        ours = pinning.taking_pin_memory(function)
        rule = rules.get(function) or rules.get(ours)
        if rule is not None:
            rules[function] = rules[ours] = rule


_install()
