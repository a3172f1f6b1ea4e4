"""Which operators a worker runs: those of ``torch.ops.aten``, but for the ones that leave the device."""

from __future__ import annotations

import re
from typing import Any

import torch

_NAME = re.compile(r"aten::([a-z_][a-z0-9_]*)\.([a-z][a-z0-9_]*)", re.IGNORECASE)

#: The kinds of argument that a record can carry.
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

#: Tensors that are no plain memory: their kernels trust indices and offsets that a client could make up.
_OTHER_LAYOUTS = re.compile(
    r"sparse|nested|jagged|mkldnn|_csr|fbgemm|^_test_|^quantize|_quantized(_|$)|_cslt|semi_structured"
)

#: What Python's &, |, ^, << and >> are called.
_SIGNS = frozenset(f"__{i}{name}__" for i in ("", "i") for name in ("and", "or", "xor", "lshift", "rshift"))


class NotAllowed(RuntimeError):
    """The operator is none that a worker runs for a client."""


def resolve(name: str) -> Any:
    """``"aten::add.Tensor"`` → ``torch.ops.aten.add.Tensor``. Raises :class:`NotAllowed`."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise NotAllowed(f"{name!r} is not the name of an operator of this device")
    packet_name, overload = match.groups()
    if packet_name.lower() in REFUSED or (packet_name.startswith("__") and packet_name not in _SIGNS):
        raise NotAllowed(f"{name} is refused: it does not work on the device's memory alone")
    if _OTHER_LAYOUTS.search(packet_name):
        raise NotAllowed(f"{name} is refused: there are only tensors with sizes and strides here")
    packet = getattr(torch.ops.aten, packet_name, None)
    op = (
        getattr(packet, overload, None)
        if overload in (packet.overloads() if packet is not None else ())
        else None
    )
    if op is None:
        raise NotAllowed(f"this worker's PyTorch {torch.__version__} has no operator {name}")
    for argument in op._schema.arguments:
        kind = _WRAPPED.sub("", str(argument.type))
        # Storages, streams and packed parameters have no encoding on the wire, and none is wanted.
        if kind not in _PLAIN and not argument.has_default_value():
            raise NotAllowed(f"{name} is refused: it takes a {kind}")
    return op
