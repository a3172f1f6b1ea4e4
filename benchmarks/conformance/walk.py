"""Uses every public name of PyTorch that has to do with a GPU: ``python -m benchmarks.conformance.walk``.

Each name works (the CPU's value, or what CUDA raises), is refused with one line, or is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import re
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import jupyter_gpupool

from . import names
from .seeds import seed

OUTPUT = Path(__file__).parent / "names.json"
DEVICE = "cuda:0"

WORKS, REFUSED, FAULT = "works", "refused", "fault"


class Use(NamedTuple):
    """One use of a name on the device, and what came of it: WORKS, REFUSED or FAULT, and why."""

    area: str
    name: str
    how: str
    verdict: str
    why: str


class Difference(Exception):
    """The device's value is not the CPU's."""


# -- comparing


def _as_text(text: str) -> str:
    """Text about a tensor on the device, as it is about one on the CPU."""
    return re.sub(r",\s+device='cuda:0'", "", text).replace("torch.cuda.", "torch.")


def compare(got: Any, wanted: Any, values: bool = True, same_kind: bool = False) -> None:
    """Raise :class:`Difference` if ``got``, from the device, is not ``wanted``, from the CPU.

    Without ``values``, elements are not compared; with ``same_kind``, only types are.
    """
    if isinstance(wanted, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            raise Difference(f"{type(got).__name__} instead of a tensor")
        _compare_tensors(got, wanted, values)
    elif type(got) is not type(wanted) and not (callable(got) and callable(wanted)):
        raise Difference(f"{type(got).__name__} instead of {type(wanted).__name__}")
    elif isinstance(wanted, (list, tuple)):
        if len(got) != len(wanted):
            raise Difference(f"{len(got)} results instead of {len(wanted)}")
        for a, b in zip(got, wanted):
            compare(a, b, values, same_kind)
    elif isinstance(wanted, dict):
        if list(got) != list(wanted):
            raise Difference(f"keys {list(got)} instead of {list(wanted)}")
        compare(list(got.values()), list(wanted.values()), values, same_kind)
    elif isinstance(wanted, types.GeneratorType):
        compare(list(got), list(wanted), values, same_kind)
    elif same_kind or not values:
        pass
    elif isinstance(wanted, str):
        if _as_text(got) != wanted:
            raise Difference(f"{got!r} instead of {wanted!r}")
    elif isinstance(wanted, float):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    elif isinstance(wanted, (int, complex, torch.dtype, torch.layout, torch.memory_format)) and got != wanted:
        raise Difference(f"{got!r} instead of {wanted!r}")


def _compare_tensors(got: torch.Tensor, wanted: torch.Tensor, values: bool) -> None:
    for what in ("shape", "dtype", "layout", "requires_grad"):
        a, b = getattr(got, what), getattr(wanted, what)
        if a != b:
            raise Difference(f"{what} {a} instead of {b}")
    if values:
        torch.testing.assert_close(got.detach().cpu(), wanted.detach().cpu(), equal_nan=True)


# -- judging


#: What a refusal names: that the GPU is leased, or another machine's, or lacks a sensor (an emulated one).
_WORDS = re.compile(r"leased GPU|GPU server|leased device|does not report it$")
#: PyTorch's own refusal, until 2.12, to use a tensor with names on a device that is written in Python.
_NAMED = "Named tensors are currently unsupported"
_INSIDES = (AttributeError, AssertionError, KeyError, IndexError, UnboundLocalError, RecursionError)


def judge(use: Callable[[], Any], wanted: Any = None, **how: Any) -> tuple[str, str]:
    """(verdict, why) of a use on the device; ``wanted`` is the CPU's value, or the exception that it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed(DEVICE)
            got = use()
    except Exception as e:
        line = str(e).split("\n")[0]
        why = f"{type(e).__name__}: {line}"[:300]
        if isinstance(wanted, BaseException) and type(e) is type(wanted):
            return WORKS, why
        return (REFUSED if _WORDS.search(str(e)) and not isinstance(e, _INSIDES) else FAULT), why
    if isinstance(wanted, BaseException):
        return FAULT, f"no {type(wanted).__name__}: {wanted}".split("\n")[0]
    try:
        compare(got, wanted, **how)
    except Exception as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]
        return (REFUSED if _NAMED in str(e) else FAULT), why
    return WORKS, ""


def attempt(use: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The value of a use on the CPU, or the exception that it raised."""
    with contextlib.suppress(Exception):
        torch.cuda.synchronize()  # what an earlier use failed with is not the next one's fault
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed()
            return use(), None
    except Exception as e:
        return None, e


# -- the areas


def _method(name: str, make: Callable[[], torch.Tensor], arguments: Any) -> Callable[[], Any]:
    def use() -> Any:
        value = getattr(make(), name)
        return _plain(value(*arguments(make)) if callable(value) else value)

    return use


def tensor_uses(area: str, wrap: Callable[[torch.Tensor], torch.Tensor], *only: str) -> Iterator[Use]:
    """Use each public member of ``torch.Tensor``, on several tensors and with the arguments of each overload."""
    for name in only or names.members(torch.Tensor):
        if name in names.ALWAYS_RAISE:
            continue
        if name in names.AS_CUDA:
            if area != "torch.Tensor":
                continue  # of what requires grad, PyTorch refuses these on every device
            kind, text = names.AS_CUDA[name]
            call = names.TENSOR_CALLS.get(name, lambda x, name=name: getattr(x, name)())
            verdict, why = judge(lambda call=call: call(wrap(names.floats(DEVICE))), kind(text))
            if verdict == WORKS and text not in why:
                verdict = FAULT
            yield Use(area, name, "as CUDA", verdict, why)
            continue
        found = [*_tensor_uses(area, name, wrap, names.TENSORS)]
        if not found:
            found = [*_tensor_uses(area, name, wrap, names.OTHER_LAYOUTS)]
        if not found and area == "torch.Tensor":
            raise LookupError(
                f"torch.Tensor.{name}: no arguments fit; give it an entry in names.TENSOR_CALLS"
            )
        yield from found


def _tensor_uses(area: str, name: str, wrap: Any, tensors: Any) -> Iterator[Use]:
    how = {"values": name not in names.RANDOM, "same_kind": name in names.OWN}
    call = names.TENSOR_CALLS.get(name)
    if call is not None:
        uses = {d: (lambda d=d: call(wrap(names.floats(d)))) for d in ("cpu", DEVICE)}
        wanted, error = attempt(uses["cpu"])
        if error is None:
            yield Use(area, name, "float32[3, 3]", *judge(uses[DEVICE], wanted, **how))
        return
    for label, make in tensors.items():
        for arguments in names.argument_lists(name):
            on = {d: _method(name, lambda d=d, make=make: wrap(make(d)), arguments) for d in ("cpu", DEVICE)}
            wanted, error = attempt(on["cpu"])
            if error is None:
                yield Use(area, name, label, *judge(on[DEVICE], wanted, **how))


def object_uses(
    area: str, kind: type, make: Callable[[str], Any], calls: dict[str, names.Call], raising: frozenset[str]
) -> Iterator[Use]:
    """Use each public member of a class on an object of the CPU and on one of the device."""
    for name in names.members(kind):
        call = calls.get(name)
        if call is None:
            if name in raising:
                continue

            def call(value: Any, name: str = name) -> Any:
                member = getattr(value, name)
                return member() if callable(member) else member

        wanted, error = attempt(lambda call=call: _plain(call(make("cpu"))))
        if error is not None:
            raise LookupError(f"{area}.{name}: {error}; give it an entry in names.py")
        how = {"same_kind": name in names.OWN}
        yield Use(area, name, "", *judge(lambda call=call: _plain(call(make(DEVICE))), wanted, **how))


def _plain(value: Any) -> Any:
    """A module as its state, a storage as its bytes."""
    if isinstance(value, torch.nn.Module):
        return value.state_dict()
    if isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
        return value.tolist()
    if isinstance(value, types.GeneratorType):
        return [_plain(v) for v in value]
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    return value


def module_uses(area: str) -> Iterator[Use]:
    """Use each documented name of a module of PyTorch's for a device."""
    try:
        module = importlib.import_module(area)
    except ImportError:
        return  # an earlier release of PyTorch
    for name in names.public_names(area, module):
        yield Use(area, name, "", *judge(_function(area, module, name), **_ANY))


_ANY = {"same_kind": True, "values": False}


def _function(area: str, module: Any, name: str) -> Callable[[], Any]:
    call = names.QUALIFIED_CALLS.get(f"{area}.{name}") or names.FUNCTION_CALLS.get(name)

    def use() -> None:
        if call is not None:
            call(module)
            return
        value = getattr(module, name)
        if inspect.ismodule(value) or not callable(value) or isinstance(value, type):
            if isinstance(value, type) and not issubclass(value, (Exception, property)):
                value()
            return
        value()

    value = getattr(module, name, None)
    if call is None and callable(value) and not isinstance(value, type) and not _callable_without(value):
        raise LookupError(f"{area}.{name} needs arguments; give it an entry in names.FUNCTION_CALLS")
    return use


def _callable_without(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _parameter(t: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(t, requires_grad=t.is_floating_point() or t.is_complex())


AREAS: dict[str, Callable[[], Iterator[Use]]] = {
    "torch.Tensor": lambda: tensor_uses("torch.Tensor", lambda t: t),
    "torch.nn.Parameter": lambda: tensor_uses("torch.nn.Parameter", _parameter),
    "torch.nn.Module": lambda: object_uses(
        "torch.nn.Module", torch.nn.Module, names.module, names.MODULE_CALLS, names.MODULE_ALWAYS_RAISE
    ),
    "torch.UntypedStorage": lambda: object_uses(
        "torch.UntypedStorage",
        torch.UntypedStorage,
        names.storage,
        names.STORAGE_CALLS,
        names.STORAGE_ALWAYS_RAISE,
    ),
    "torch.TypedStorage": lambda: object_uses(
        "torch.TypedStorage",
        torch.TypedStorage,
        names.typed_storage,
        names.TYPED_STORAGE_CALLS,
        names.STORAGE_ALWAYS_RAISE,
    ),
    **{area: (lambda area=area: module_uses(area)) for area in names.MODULES},
}


# -- the figures


def figures(uses: list[Use]) -> list[dict[str, Any]]:
    """For each area, the number of its names by their worst verdict, and the names that are refused."""
    worst: dict[tuple[str, str], str] = {}
    order = (WORKS, REFUSED, FAULT)
    for use in uses:
        before = worst.get((use.area, use.name), WORKS)
        worst[use.area, use.name] = max(before, use.verdict, key=order.index)
    rows = []
    for area in dict.fromkeys(use.area for use in uses):
        counts = Counter(verdict for (a, _), verdict in worst.items() if a == area)
        refused = sorted(name for (a, name), verdict in worst.items() if a == area and verdict == REFUSED)
        rows.append({"area": area, **{v: counts[v] for v in order}, "refused_names": refused})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance.walk", description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help="such as torch.cuda; default: all of them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    uses: list[Use] = []
    for area in args.areas or AREAS:
        lease = jupyter_gpupool.attach(num_gpus=2)
        uses += AREAS[area]()
        lease.release()
    rows = figures(uses)
    for use in uses:
        if use.verdict == FAULT:
            print(f"{use.area}.{use.name} {use.how}: {use.why}")
    for row in rows:
        print(f"{row['area']}: {row[WORKS]} work, {row[REFUSED]} refused, {row[FAULT]} faults")
    if not args.areas:
        found = {"torch": torch.__version__, "table": rows}
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {args.output}")
    return 1 if any(row[FAULT] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
