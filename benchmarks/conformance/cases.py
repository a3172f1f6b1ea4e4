"""One sample of one entry, in one dtype, one way: on the CPU, on the device, and compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import set_rng_seed
from torch.utils._pytree import tree_flatten, tree_map

from .refusals import TOLERANCES, TOLERANCES_OF_HALVES, UNINITIALISED
from .seeds import SEED, seed

KINDS = ("forward", "backward", "in place", "out", "not contiguous")


class NotASample(Exception):
    """The CPU refuses the sample or has no such variant, so there is no reference."""


@dataclass(frozen=True)
class Case:
    entry: str
    dtype: str
    kind: str
    index: int
    run: Callable[[str], Any]

    def check(self, device: str) -> None:
        """Compare device and CPU. Raises NotASample, the device's error, or AssertionError where they differ."""
        try:
            seed()
            expected = self.run("cpu")
        except Exception as e:
            raise NotASample(str(e)) from e
        seed(device)
        actual = _to_cpu(self.run(device))
        expected = _to_cpu(expected)
        if self.entry in UNINITIALISED:
            actual, expected = (tree_map(torch.zeros_like, found) for found in (actual, expected))
        tolerances = TOLERANCES_OF_HALVES if self.dtype in ("float16", "bfloat16") else TOLERANCES
        rtol, atol = tolerances.get(self.entry, (None, None))
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=atol, equal_nan=True, check_stride=False, check_layout=True
        )


def entries() -> list[Any]:
    """Return the suite's entries, in its order."""
    return list(op_db)


def cases(
    entry: Any, kinds: tuple[str, ...] = KINDS, dtypes: Any = None, limit: int | None = None
) -> Iterator[Case]:
    """Yield the cases of one entry; ``limit`` is the largest number of samples per kind and dtype."""
    for kind in kinds:
        known = (
            entry.supported_backward_dtypes("cpu") if kind == "backward" else entry.supported_dtypes("cpu")
        )
        if kind == "backward" and not entry.supports_autograd:
            continue
        if kind == "in place" and entry.get_inplace() is None or kind == "out" and not entry.supports_out:
            continue
        for dtype in sorted(known, key=str):
            if dtypes is not None and dtype not in dtypes:
                continue
            for index, sample in enumerate(itertools.islice(_samples(entry, dtype, kind), limit)):
                yield Case(entry.formatted_name, str(dtype)[6:], kind, index, _runner(entry, sample, kind))


def _samples(entry: Any, dtype: torch.dtype, kind: str) -> Iterator[Any]:
    """Yield samples of the suite.

    They come from the function that makes them: ``entry.sample_inputs`` reads the source of every frame on the stack to
    find the name of the test, which took six times as long as all the rest of a case.
    """
    try:
        samples = iter(entry.sample_inputs_func(entry, "cpu", dtype, kind == "backward"))
        while True:
            set_rng_seed(SEED)
            sample = next(samples, None)
            if sample is None:
                return
            yield sample.noncontiguous() if kind == "not contiguous" else sample
    except Exception:
        return  # the suite itself has no samples in this dtype


def _runner(entry: Any, sample: Any, kind: str) -> Callable[[str], Any]:
    def run(device: str) -> Any:
        first, args, kwargs = tree_map(lambda x: _on(x, device), (sample.input, sample.args, sample.kwargs))
        if kind == "in place":
            if sample.broadcasts_input:
                raise NotASample("the result does not fit into the input")
            first = first.clone() if isinstance(first, torch.Tensor) else first
            return entry.get_inplace()(first, *args, **kwargs), first
        if kind == "out":
            state = torch.get_rng_state()
            wanted = entry(*_on_cpu((sample.input, *sample.args)), **_on_cpu(sample.kwargs))
            torch.set_rng_state(state)
            out = tree_map(lambda t: torch.empty_like(t, device=device), wanted)
            return entry(first, *args, out=out, **kwargs)
        result = entry(first, *args, **kwargs)
        if kind != "backward":
            return result
        return _gradients(entry, sample, result, (first, args, kwargs))

    return run


def _gradients(entry: Any, sample: Any, result: Any, inputs: Any) -> Any:
    if sample.output_process_fn_grad is not None:
        result = sample.output_process_fn_grad(result)
    outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves = [t for t in tree_flatten(inputs)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
    if not outputs or not leaves:
        raise NotASample("nothing here has a gradient")
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _on(x: Any, device: str) -> Any:
    if isinstance(x, torch.Tensor):
        there = x.detach().to(device, copy=True)
        if x.layout is torch.strided and x.stride() != there.stride():
            there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x.detach())
        return there.requires_grad_(x.requires_grad)
    if x == "cpu" or isinstance(x, torch.device):
        return torch.device(device)
    return x


def _on_cpu(x: Any) -> Any:
    return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, x)


def _to_cpu(x: Any) -> Any:
    return tree_map(lambda t: t.detach().cpu() if isinstance(t, torch.Tensor) else t, x)
