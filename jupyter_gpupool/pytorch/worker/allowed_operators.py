"""Decides which operators a worker runs.

They are those of ``torch.ops.aten`` that use the device's memory alone, and those of other libraries that an
administrator allows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.recurrent import RNN, RNN_BACKWARD

#: Operators of this package, which client and worker share.
OWN = {f"{op.name()}.default": op for op in (RNN, RNN_BACKWARD)}

_NAME = re.compile(r"aten::([a-z_][a-z0-9_]*)\.([a-z][a-z0-9_]*)", re.IGNORECASE)

#: As _NAME, of another library.
_EXTRA = re.compile(r"([a-z_]\w*::[a-z_]\w*)\.([a-z]\w*)", re.IGNORECASE | re.ASCII)

#: The types of arguments that a command can carry.
_PLAIN = frozenset(
    [
        "Tensor",
        "int",
        "SymInt",
        "float",
        "bool",
        "number",
        "str",
        "Device",
        "Layout",
        "MemoryFormat",
        "ScalarType",
        "Generator",
    ]
)
_WRAPPED = re.compile(r"Optional\[|List\[|\]")

#: Operators that touch files, processes, host memory or the worker's own state.
REFUSED = frozenset(
    {
        "from_file",
        "pin_memory",
        "_pin_memory",
        "is_pinned",
        "record_stream",
        "_print",
        "_test_warn_in_autograd",
        "set_data",
        "_backward",
        "retain_grad",
        "requires_grad_",
        "resize_",
        "resize",
        "resize_as_",
        "resize_as",
        "_resize_output_",
        "_resize_output",
        "_copy_from_and_resize",
        "set_",
        "set_grad_enabled",
        "_cufft_set_plan_cache_max_size",
        "_make_dep_token",
        "manual_seed",
        "seed",
        "save",
        "get_gradients",
    }
)

#: Recurrent networks: their kernels trust the sizes of the parameters. ``gpupool::rnn`` checks these first.
_UNCHECKED = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})

#: Operators on other layouts: their kernels trust indices and offsets, which a client could forge.
_OTHER_LAYOUTS = re.compile(
    r"sparse|nested|jagged|mkldnn|_csr|fbgemm|^_test_|^quantize|_quantized(_|$)|_cslt|semi_structured"
)

#: The names of Python's &, |, ^, << and >>.
_SIGNS = frozenset(f"__{i}{name}__" for i in ("", "i") for name in ("and", "or", "xor", "lshift", "rshift"))


class OperatorRefused(RuntimeError):
    """A worker does not run this operator for a client."""


#: Operators of other libraries that are allowed: ``torchvision::nms`` → why it cannot be used, empty if it can.
_extra: dict[str, str] = {}
_where_to_allow = ""


def allow(operators: Mapping[str, str], where: str) -> None:
    """Allow these operators of other libraries, and no others; each with why it cannot be used, empty if it can.

    ``where``: what refusals say of the place where an administrator allows more.
    """
    global _where_to_allow
    _extra.clear()
    _extra.update(operators)
    _where_to_allow = where


def resolve(name: str) -> Any:
    """``"aten::add.Tensor"`` → ``torch.ops.aten.add.Tensor``. Raises :class:`OperatorRefused`."""
    if isinstance(name, str) and name in OWN:
        return OWN[name]
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None and isinstance(name, str) and (extra := _EXTRA.fullmatch(name)):
        return _plain(name, _resolve_extra(*extra.groups()))
    if match is None:
        raise OperatorRefused(
            f"{name!r} is not the name of an operator of PyTorch's core (aten), and a worker runs no others"
        )
    packet_name, overload = match.groups()
    if packet_name.lower() in REFUSED or (packet_name.startswith("__") and packet_name not in _SIGNS):
        raise OperatorRefused(
            f"{name} is refused on a leased GPU, because it uses more than the GPU's memory; run it on CPU tensors"
        )
    if _OTHER_LAYOUTS.search(packet_name):
        raise OperatorRefused(
            f"{name} is refused on a leased GPU, which has only dense tensors; use dense tensors, or the CPU"
        )
    if packet_name in _UNCHECKED:
        raise OperatorRefused(f"{name} is refused on a leased GPU; a client sends gpupool::rnn in its place")
    packet = getattr(torch.ops.aten, packet_name, None)
    op = (
        getattr(packet, overload, None)
        if overload in (packet.overloads() if packet is not None else ())
        else None
    )
    if op is None:
        raise OperatorRefused(
            f"the GPU server's PyTorch {torch.__version__} has no operator {name}; install the same release on both"
        )
    return _plain(name, op)


def _resolve_extra(operator: str, overload: str) -> Any:
    if operator not in _extra:
        allowed = ", ".join(sorted(_extra)) or "empty"
        raise OperatorRefused(
            f"{operator} is not in the list of further operators that this GPU server allows ({allowed}); "
            f"an administrator can add it{_where_to_allow}"
        )
    if _extra[operator]:
        raise OperatorRefused(f"{operator} cannot be used on this GPU server: {_extra[operator]}")
    library, _, name = operator.partition("::")
    packet = getattr(getattr(torch.ops, library), name, None)
    op = getattr(packet, overload) if packet is not None and overload in packet.overloads() else None
    if op is None:
        raise OperatorRefused(
            f"the library on the GPU server has no operator {operator}.{overload}; install the same release on both"
        )
    return op


def _plain(name: str, op: Any) -> Any:
    """``op``, if commands can carry its arguments. Raises :class:`OperatorRefused`."""
    for argument in op._schema.arguments:
        kind = _WRAPPED.sub("", str(argument.type))
        # Commands cannot carry storages, streams and packed parameters, and should not.
        if kind not in _PLAIN and not argument.has_default_value():
            raise OperatorRefused(
                f"{name} is refused on a leased GPU, because it takes an argument of type {kind}; run it on CPU tensors"
            )
    return op
