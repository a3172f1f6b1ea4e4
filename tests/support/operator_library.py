"""A library of operators as others ship them: what PyTorch does not know by itself, and learns by importing this."""

from __future__ import annotations

import torch

_library = torch.library.Library("gpupool_tests", "DEF")
_library.define("scale_rows(Tensor x, Tensor factors, float more=1.0) -> Tensor")
_library.define("above(Tensor x, float least) -> Tensor")
_library.define("halve_(Tensor(a!) x) -> ()")
_library.define("count(Tensor x) -> int")
_library.define("secret(Tensor x) -> Tensor")


def _scale_rows(x: torch.Tensor, factors: torch.Tensor, more: float = 1.0) -> torch.Tensor:
    return x * factors[:, None] * more


def _above(x: torch.Tensor, least: float) -> torch.Tensor:
    return x[x > least]


def _halve_(x: torch.Tensor) -> None:
    x.mul_(0.5)


def _count(x: torch.Tensor) -> int:
    return int((x > 0).sum())


for _name, _kernel in (
    ("scale_rows", _scale_rows),
    ("above", _above),
    ("halve_", _halve_),
    ("count", _count),
):
    _library.impl(_name, _kernel, "CPU")
_library.impl("secret", torch.clone, "CPU")


@torch.library.register_fake("gpupool_tests::scale_rows", lib=_library)
def _(x: torch.Tensor, factors: torch.Tensor, more: float = 1.0) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    factors, more = ctx.saved  # type: ignore[attr-defined]
    return torch.ops.gpupool_tests.scale_rows(grad, factors, more), None, None


def _setup(ctx: object, inputs: tuple[torch.Tensor, torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.saved = inputs[1:]  # type: ignore[attr-defined]


torch.library.register_autograd("gpupool_tests::scale_rows", _backward, setup_context=_setup, lib=_library)
