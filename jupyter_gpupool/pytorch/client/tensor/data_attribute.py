"""``t.data = value`` between the CPU and a slice: the tensor moves, and stays the same Python object.

``Module.to()`` and ``Module.cuda()`` move parameters so, with their hooks, their attributes and their ties.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch.overrides import handle_torch_function, has_torch_function

from jupyter_gpupool.pytorch.torch_internals.client import (
    HAS_COMPATIBLE_COPY_TYPE,
    DisableTorchFunctionSubclass,
    make_subclass,
    swap_tensor_impl,
)

from .patches import Patches
from .subclasses import attributes, home_class, make_of_class
from .tensor import RemoteTensor

_get: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_set: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Hooks:
    """The hooks of a leaf. They belong to what is swapped, but have to stay with the Python object."""

    def __init__(self, t: torch.Tensor) -> None:
        self._backward, self._accumulated = t._backward_hooks, t._post_accumulate_grad_hooks

    def attach(self, t: torch.Tensor) -> None:
        """Let ``t`` call the hooks. Handles that were returned for them still remove them."""
        if self._backward:
            t._backward_hooks = self._backward
        if self._accumulated:
            t._post_accumulate_grad_hooks = self._accumulated


def crosses(t: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether one of both is on a slice, and the other has memory in this process."""
    here = isinstance(t, RemoteTensor)
    if here == isinstance(value, RemoteTensor):
        return False
    other = value if here else t
    return other.device.type == "cpu" and other.layout is torch.strided


def get_data(t: torch.Tensor) -> torch.Tensor:
    """``t.data``."""
    if has_torch_function((t,)):
        # The program knows it by this name.
        return handle_torch_function(torch.Tensor.data.__get__, (t,), t)  # type: ignore[attr-defined]
    return _get(t)


def set_data(t: torch.Tensor, value: torch.Tensor) -> None:
    """``t.data = value``."""
    if has_torch_function((t,)):
        handle_torch_function(torch.Tensor.data.__set__, (t,), t, value)  # type: ignore[attr-defined]
    elif crosses(t, value):
        become(t, value)
    elif isinstance(t, RemoteTensor):
        if not isinstance(value, RemoteTensor):
            raise RuntimeError(
                f"cannot put data of device {value.device} into a tensor of device {t.device}; "
                "use .to() or copy_()"
            )
        _set(t, value)
        t._storage, t._geometry = value._storage, value._geometry
    else:
        _set(t, value)


def become(t: torch.Tensor, value: torch.Tensor) -> None:
    """Give ``t`` the elements, the shape and the device of ``value``, whose memory both then share.

    Variables, modules and optimizers keep ``t``. Its class, attributes and hooks remain, and its gradient
    moves along. Raises RuntimeError if ``t`` is not a leaf.
    """
    if not t.is_leaf:
        raise RuntimeError(
            f"cannot move the result of an operator from {t.device} to {value.device} in place, because its "
            "gradient is computed where it is; use .to()"
        )
    with DisableTorchFunctionSubclass():
        hooks = Hooks(t)
        gradient, t.grad = t.grad, None
        _disown(t)
        fresh = _of_class(home_class(t), value).requires_grad_(t.requires_grad)
        kept = {**attributes(t), **fresh.__dict__}
        t.__class__, fresh.__class__ = type(fresh), type(t)
        fresh.__dict__, t.__dict__ = t.__dict__, kept
        swap_tensor_impl(t, fresh)  # what torch.utils.swap_tensors() ends with
        hooks.attach(t)
        if gradient is not None and gradient.shape == t.shape:
            with torch.no_grad():
                become(gradient, gradient.to(t.device, t.dtype))
            t.grad = gradient


def _of_class(home: type, value: torch.Tensor) -> torch.Tensor:
    """A new leaf with the memory of ``value`` and the class that ``home`` is on its device."""
    if isinstance(value, RemoteTensor):
        return make_of_class(home, value._storage, value._geometry)
    return make_subclass(home, make_subclass(torch.Tensor, value))


def _disown(t: torch.Tensor) -> None:
    """Let a graph that uses ``t`` where it is now raise an error when it is differentiated: ``t`` leaves it."""
    if not t.requires_grad or t._use_count() == 1:  # type: ignore[attr-defined]
        return
    before = t.device

    def refuse(gradients: Any) -> NoReturn:
        raise RuntimeError(
            f"a parameter was moved from {before} after this graph had used it, so its gradient has nowhere to go; "
            "move the model before the forward pass, or after the backward pass"
        )

    torch.autograd.graph.get_gradient_edge(t).node.register_prehook(refuse)


def alias(patches: Patches) -> None:
    """Let tensors cross between the CPU and a slice by their ``data``."""
    native = HAS_COMPATIBLE_COPY_TYPE.value

    # The compiler checks that the arguments have PyTorch's names.
    @functools.wraps(native)
    def compatible(input: torch.Tensor, from_: torch.Tensor) -> bool:
        return native(input, from_) or crosses(input, from_)

    # Module._apply() asks this; it then assigns to .data, and otherwise makes another parameter.
    patches.set(*HAS_COMPATIBLE_COPY_TYPE, compatible)
    patches.set(torch.Tensor, "data", property(get_data, set_data))


def register() -> None:
    """Let remote tensors accept new data."""
    RemoteTensor.data = property(get_data, set_data)  # type: ignore[assignment]
