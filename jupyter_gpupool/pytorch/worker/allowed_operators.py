"""Decides which operators a worker runs: those of ``torch.ops.aten`` that use the device's memory alone."""

from __future__ import annotations

import re
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.recurrent import RNN, RNN_BACKWARD

#: Operators of this package, which client and worker share.
OWN = {f"{op.name()}.default": op for op in (RNN, RNN_BACKWARD)}

_NAME = re.compile(r"aten::([a-z_][a-z0-9_]*)\.([a-z][a-z0-9_]*)", re.IGNORECASE)

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


def resolve(name: str) -> Any:
    """``"aten::add.Tensor"`` → ``torch.ops.aten.add.Tensor``. Raises :class:`OperatorRefused`."""
    if isinstance(name, str) and name in OWN:
        return OWN[name]
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
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
    for argument in op._schema.arguments:
        kind = _WRAPPED.sub("", str(argument.type))
        # Commands cannot carry storages, streams and packed parameters, and should not.
        if kind not in _PLAIN and not argument.has_default_value():
            raise OperatorRefused(
                f"{name} is refused on a leased GPU, because it takes an argument of type {kind}; run it on CPU tensors"
            )
    return op
