"""Every collective, operation, dtype, odd shape and layout, against its definition computed on the CPU.

Ranks are summed in their order, so results are compared digit by digit. What a rank brings follows from its number,
so every rank knows what all of them bring.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

SHAPES = ((), (1,), (7,), (3, 5), (2, 1, 3), (0,), (0, 4), (1025,))
DTYPES = tuple(
    getattr(torch, name)
    for name in (
        *("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
        *("bool", "complex64", "complex128"),
    )
)
LAYOUTS = ("contiguous", "transposed", "every second", "within a larger one")
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


class Case(NamedTuple):
    kind: str
    operation: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        words = (self.kind, self.operation, str(self.dtype)[6:], list(self.shape), self.layout)
        return " ".join(str(word) for word in words if word != "")


def operations(dtype: torch.dtype) -> tuple[str, ...]:
    """What CUDA's NCCL reduces in that dtype; its averages are of floating-point numbers."""
    if dtype.is_complex:
        return ("SUM", "AVG")
    if dtype.is_floating_point:
        return ("SUM", "AVG", "PRODUCT", "MIN", "MAX")
    return ("SUM", "PRODUCT", "MIN", "MAX")


_PLAIN = (
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "gather",
    "scatter",
    "all_to_all",
    "all_to_all_single",
)
_REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")


def cases(names: Sequence[str]) -> Iterator[Case]:
    """All of them whose names contain one of ``names``."""
    for dtype in DTYPES:
        for shape in SHAPES:
            for layout in LAYOUTS if len(shape) > 1 or shape == (7,) else LAYOUTS[:1]:
                for kind in _PLAIN:
                    yield from _named(Case(kind, "", dtype, shape, layout), names)
                for kind in _REDUCING:
                    for operation in operations(dtype):
                        yield from _named(Case(kind, operation, dtype, shape, layout), names)


def _named(case: Case, names: Sequence[str]) -> Iterator[Case]:
    if not names or any(part in str(case) for part in names):
        yield case


def brought(case: Case, rank: int, number: int = 0) -> torch.Tensor:
    """The tensor with that number that a rank brings, on the CPU and contiguous."""
    draws = torch.Generator().manual_seed(1000 * rank + number)
    if case.dtype == torch.bool:
        return torch.rand(case.shape, generator=draws) < 0.5
    if case.dtype.is_complex:
        return (torch.randn((*case.shape, 2), generator=draws).double()[..., 0] * (1 + 0.5j)).to(case.dtype)
    return (torch.rand(case.shape, generator=draws) * 9 + 1).to(case.dtype)


def laid_out(t: torch.Tensor, layout: str, device: str) -> torch.Tensor:
    """A copy of ``t`` on the device in that layout."""
    shape = list(t.shape)
    if layout == "transposed" and len(shape) > 1:
        place = torch.empty(shape[::-1], dtype=t.dtype, device=device).permute(*range(len(shape))[::-1])
    elif layout == "every second":
        place = torch.empty([*shape[:-1], 2 * shape[-1]], dtype=t.dtype, device=device)[..., ::2]
    elif layout == "within a larger one":
        place = torch.empty([shape[0] + 2, *shape[1:]], dtype=t.dtype, device=device)[1:-1]
    else:
        place = torch.empty(shape, dtype=t.dtype, device=device)
    return place.copy_(t)


def reduced(case: Case, size: int, number: int = 0) -> torch.Tensor:
    """The definition: every rank's tensor, in the order of the ranks."""
    total = reduce(_COMBINE[case.operation], [brought(case, r, number) for r in range(size)])
    if case.operation != "AVG":
        return total
    return torch.view_as_complex(torch.view_as_real(total) / size) if total.is_complex() else total / size


def run(case: Case, rank: int, size: int, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What this rank has after the collective, and what it has to have. The root is the last rank."""
    root, every = size - 1, range(size)
    op = getattr(dist.ReduceOp, case.operation or "SUM")

    def mine(number: int = 0) -> torch.Tensor:
        return laid_out(brought(case, rank, number), case.layout, device)

    def empty() -> torch.Tensor:
        return laid_out(torch.zeros(case.shape, dtype=case.dtype), case.layout, device)

    def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tuple(parts))

    outs = [empty() for _ in every]
    if case.kind == "all_reduce":
        dist.all_reduce(t := mine(), op)
        return [t], [reduced(case, size)]
    if case.kind == "reduce":
        dist.reduce(t := mine(), root, op)
        return ([t], [reduced(case, size)]) if rank == root else ([], [])
    if case.kind == "broadcast":
        dist.broadcast(t := mine(), root)
        return [t], [brought(case, root)]
    if case.kind == "all_gather":
        dist.all_gather(outs, mine())
        return outs, [brought(case, r) for r in every]
    if case.kind == "all_gather_into_tensor":
        whole = torch.zeros((size, *case.shape), dtype=case.dtype, device=device)
        dist.all_gather_into_tensor(whole, mine())
        return [whole], [joined([brought(case, r) for r in every])]
    if case.kind == "gather":
        dist.gather(mine(), outs if rank == root else None, root)
        return (outs, [brought(case, r) for r in every]) if rank == root else ([], [])
    if case.kind == "scatter":
        dist.scatter(t := empty(), [mine(n) for n in every] if rank == root else None, root)
        return [t], [brought(case, root, rank)]
    if case.kind == "all_to_all":
        dist.all_to_all(outs, [mine(n) for n in every])
        return outs, [brought(case, r, rank) for r in every]
    if case.kind == "all_to_all_single":
        whole = torch.zeros((size, *case.shape), dtype=case.dtype, device=device)
        dist.all_to_all_single(whole, joined([mine(n) for n in every]))
        return [whole], [joined([brought(case, r, rank) for r in every])]
    if case.kind == "reduce_scatter":
        dist.reduce_scatter(t := empty(), [mine(n) for n in every], op)
        return [t], [reduced(case, size, rank)]
    dist.reduce_scatter_tensor(t := empty(), joined([mine(n) for n in every]), op)
    return [t], [reduced(case, size, rank)]


def judge(case: Case, rank: int, size: int) -> tuple[str, str]:
    """(verdict, why) of a case at this rank."""
    try:
        found, expected = run(case, rank, size, f"cuda:{rank}")
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b.to(case.dtype), rtol=0, atol=0, equal_nan=True)
    except (NotImplementedError, ValueError) as e:
        return "refused", f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]
    except Exception as e:
        return "failed", f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]
    return "passed", ""


def _rank(rank: int, size: int, store: str, names: Sequence[str], answers: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=size)
    answers.put((rank, [judge(case, rank, size) for case in cases(names)]))
    dist.destroy_process_group()


def suite(size: int, names: Sequence[str], log: Path) -> Iterator[tuple[str, str, str]]:
    """Run every case with ``size`` ranks; yield each one's (name, verdict, why), the worst of its ranks."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    store = str(log.with_name("store"))
    ranks = [context.Process(target=_rank, args=(rank, size, store, names, answers)) for rank in range(size)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=3600) for _ in ranks)
    for process in ranks:
        process.join()
    for case, verdicts in zip(cases(names), zip(*(found[r] for r in range(size)), strict=True), strict=True):
        order = ("passed", "refused", "failed")
        yield str(case), *max(verdicts, key=lambda v: order.index(v[0]))
