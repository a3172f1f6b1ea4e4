"""What a worker tells its client of an operator that failed."""

from __future__ import annotations

from typing import Any

import torch

from .program import Template


def report_call(t: Template, fields: list, e: BaseException) -> dict[str, Any]:
    """``report_of`` with the tensors' dtypes and sizes, and which storages the call was to make or change."""
    report = report_of(t.name, e)
    report["arguments"] = [
        f"{str(dtype)[6:]}[{', '.join(map(str, size))}]"
        for size, _, _, dtype, _ in (t.geometries[k] for k in range(min(t.n_tensors, 8)))
    ]
    if t.new:
        report["made"] = fields[t.n_tensors + t.n_scalars]
    else:
        report["changed"] = fields[: t.n_tensors]
    return report


def report_of(operator: str | None, e: BaseException) -> dict[str, Any]:
    kind = next(
        k.__name__
        for k in type(e).__mro__
        if k.__module__ in ("builtins", "torch", "torch._C", "torch.linalg")
    )
    if isinstance(e, torch.OutOfMemoryError):
        kind = "OutOfMemoryError"
    message = str(e).split("\nException raised from")[0]
    if kind == "NotImplementedError":
        message = message.split(" This could be because")[0]  # pages about other backends follow
    return {"operator": operator, "type": kind, "message": message}
