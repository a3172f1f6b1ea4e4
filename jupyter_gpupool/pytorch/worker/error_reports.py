"""Reports of failed operators, as a worker sends them to its client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .device import Device, OutOfSliceMemory
from .host_memory import no_host_memory
from .templates import Template


def report_call(
    t: Template, fields: list[Any], e: BaseException, number: Mapping[Device, int]
) -> dict[str, Any]:
    """As :func:`report_of`, with the tensors' dtypes and sizes and the storages to be created or changed."""
    report = report_of(t.name, e, number)
    report["arguments"] = [
        f"{str(dtype)[6:]}[{', '.join(map(str, size))}]"
        for size, _, _, dtype, _ in (t.geometries[k] for k in range(min(t.n_tensors, 8)))
    ]
    if t.new:
        report["made"] = fields[t.n_tensors + t.n_scalars]
    else:
        report["changed"] = fields[: t.n_tensors]
    return report


def report_of(operator: str | None, e: BaseException, number: Mapping[Device, int]) -> dict[str, Any]:
    """``{"operator", "type", "message"}``; the type is the next built-in or PyTorch's own one.

    ``number``: the client's numbers of the devices, which CUDA_VISIBLE_DEVICES may have changed.
    """
    kind = next(
        k.__name__
        for k in type(e).__mro__
        if k.__module__ in ("builtins", "torch", "torch._C", "torch.linalg")
    )
    if isinstance(e, torch.OutOfMemoryError):
        kind = "OutOfMemoryError"
    message = str(e).split("\nException raised from")[0]
    no_memory = no_host_memory(e)
    if no_memory is not None:
        kind, message = "OutOfMemoryError", no_memory
    if isinstance(e, OutOfSliceMemory) and e.device in number:
        message = e.message(number[e.device])
    if kind == "NotImplementedError":
        message = message.split(" This could be because")[0]  # pages about other backends follow
    return {"operator": operator, "type": kind, "message": message}
