"""A graph as the worker runs it: checked once, then one operator after the other without asking anybody."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .emulation import CPU_KERNELS
from .memory import rounded
from .program import BadRecord, Geometry, Scope, decode_constant
from .rules import NotAllowed, resolve
from .slices import Device, with_generator

#: More steps than this is no graph that a compiler made.
MAX_STEPS = 200_000


class _Step:
    """One operator: where its arguments stand in the table of values, and where its result goes."""

    __slots__ = (
        *("name", "op", "kernel", "replaced", "args", "kwargs"),
        *("out", "frees", "results", "uses", "checked", "pick"),
    )

    def __init__(self, name: str, op: Any, args: list, kwargs: dict, out: int) -> None:
        self.name, self.op, self.args, self.kwargs, self.out = name, op, args, kwargs, out
        #: the operator itself, and whether something else stands in for it here
        self.kernel = op
        self.replaced = False
        self.frees: list[int] = []
        self.results: Any = None
        self.uses = sorted(_refs([*args, *kwargs.values()]))
        self.checked = False
        self.pick: Any = None


class _Ref:
    __slots__ = ("k",)

    def __init__(self, k: int) -> None:
        self.k = k


class GraphSteps:
    """A definition from graphs.py, resolved. Raises BadRecord for one that makes no sense."""

    def __init__(self, scope: Scope, definition: Any) -> None:
        try:
            self.inputs: list[Geometry] = [scope.geometry(g) for g in definition["inputs"]]
            self.returned: list[tuple[int, Geometry, int]] = [
                (int(slot), scope.geometry(geom), int(nbytes))
                for slot, geom, nbytes in definition["returned"]
            ]
            #: storages are numbered, and those of the inputs come first
            self.held = int(definition["held"])
            self.device: Device = scope.device(self.inputs[0][4]) if self.inputs else scope.home
            if any(g[4] != self.device.spec.index for g in self.inputs):
                raise BadRecord("a graph on several devices")
            self._scope = scope
            self._storages: dict[int, int] = {}
            self.wants_inductor = definition["inductor"]
            steps = definition["steps"]
            if len(steps) > MAX_STEPS:
                raise BadRecord(f"a graph of {len(steps)} operators")
            self.refused = ""
            self.steps = [self._step(k, step) for k, step in enumerate(steps, len(self.inputs))]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise BadRecord(f"a graph that makes no sense: {e}") from None
        self.n_values = len(self.inputs) + len(self.steps)
        if any(not 0 <= slot < self.n_values for slot, _, _ in self.returned):
            raise BadRecord("a graph that returns what it does not have")
        self._plan_frees()
        self.peak = self._peak()
        self.calls = 0
        self._constants: list[Any] = []

    # -- decoding

    def _step(self, out: int, wire: Any) -> _Step:
        (name, args, kwargs), results = wire
        decoded = [self._decode(a, out) for a in args]
        if name == "":
            if len(decoded) != 2 or not isinstance(decoded[0], _Ref) or not isinstance(decoded[1], int):
                raise BadRecord("an element of nothing")
            step = _Step("getitem", operator.getitem, decoded, {}, out)
        else:
            kernel, op = self._operator(name)
            step = _Step(name, op, decoded, {str(k): self._decode(v, out) for k, v in kwargs.items()}, out)
            step.kernel, step.replaced = kernel, op is not kernel
        step.results = self._decode_results(results)
        return step

    def _operator(self, name: str) -> tuple[Any, Any]:
        """The operator of that name, and what is called for it on this device."""
        try:
            kernel = op = resolve(name)
        except NotAllowed as e:
            self.refused = self.refused or str(e)  # whoever calls it is told; the session lives on
            return None, None
        device = self.device
        if device.spec.emulated:
            op = CPU_KERNELS.get(kernel, kernel)
            if torch.Tag.nondeterministic_seeded in kernel.tags:
                drawing = op
                return kernel, lambda *args, **kwargs: with_generator(device, drawing, list(args), kwargs)
        return kernel, op

    def _decode(self, value: Any, out: int) -> Any:
        if isinstance(value, list) and value:
            tag, *rest = value
            if tag == "n":
                if not isinstance(rest[0], int) or not 0 <= rest[0] < out:
                    raise BadRecord(f"a step that uses {rest[0]!r} before it is there")
                return _Ref(rest[0])
            if tag == "l":
                return [self._decode(v, out) for v in rest[0]]
            if tag == "f":
                return float(rest[0])
        return decode_constant(self._scope, value)

    def _decode_results(self, value: Any) -> Any:
        if value is None:
            return None
        tag, *rest = value
        if tag == "l":
            return [self._decode_results(v) for v in rest[0]]
        number, geom = int(rest[0]), self._scope.geometry(rest[1])
        needed = rounded(_end(geom))
        self._storages[number] = max(self._storages.get(number, 0), needed)
        return (number, geom)

    def _plan_frees(self) -> None:
        kept = {slot for slot, _, _ in self.returned} | set(range(len(self.inputs)))
        last: dict[int, _Step] = {}
        for step in self.steps:
            last[step.out] = step
            for k in step.uses:
                last[k] = step
        for k, step in last.items():
            if k not in kept:
                step.frees.append(k)

    def _peak(self) -> int:
        """Bytes of all that is new while it runs, results included, at the worst moment."""
        last: dict[int, int] = {}
        first: dict[int, int] = {}
        numbers: dict[int, list[int]] = {k: [] for k in range(len(self.inputs))}
        for moment, step in enumerate(self.steps):
            numbers[step.out] = found = _numbers(step.results)
            for number in itertools.chain(found, *(numbers[k] for k in step.uses)):
                first.setdefault(number, moment)
                last[number] = moment
        for slot, _, _ in self.returned:
            for number in numbers[slot]:
                last[number] = len(self.steps)
        changes: dict[int, int] = {}
        for number, moment in first.items():
            if number >= self.held:
                changes[moment] = changes.get(moment, 0) + self._storages[number]
                changes[last[number] + 1] = changes.get(last[number] + 1, 0) - self._storages[number]
        return max(itertools.accumulate(changes[m] for m in sorted(changes)), default=0)

    # -- running

    def run(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """What it returns, in the order of ``returned``. Raises what an operator raises, as StepFailed."""
        if self.refused:
            raise NotAllowed(self.refused)
        values: list[Any] = [*tensors, *[None] * len(self.steps)]
        if self.calls:
            return self._quickly(values)
        self.calls += 1
        for step in self.steps:
            try:
                got = step.op(
                    *[refs_as(a, values) for a in step.args],
                    **{k: refs_as(v, values) for k, v in step.kwargs.items()},
                )
            except Exception as e:
                raise StepFailed(step.name, e) from e
            if not step.checked:
                got = self._checked(step, got)
            values[step.out] = got
            for k in step.frees:
                values[k] = None
        self._arrange()
        return [values[slot] for slot, _, _ in self.returned]

    def _arrange(self) -> None:
        """After the first run: constants go into the table of values too, so that one look-up fills a call."""
        for step in self.steps:
            flat = not step.kwargs and not any(type(a) is list for a in step.args) and step.args
            if not flat or not step.checked:
                continue
            step.op = _direct(step.op)
            where = []
            for a in step.args:
                if type(a) is _Ref:
                    where.append(a.k)
                else:
                    where.append(self.n_values + len(self._constants))
                    self._constants.append(a)
            step.pick = operator.itemgetter(*where) if len(where) > 1 else _only(where[0])

    def _quickly(self, values: list[Any]) -> list[Any]:
        values += self._constants
        for step in self.steps:
            try:
                if step.pick is not None:
                    got = step.op(*step.pick(values))
                else:
                    got = step.op(
                        *[refs_as(a, values) for a in step.args],
                        **{k: refs_as(v, values) for k, v in step.kwargs.items()},
                    )
                    if not step.checked:
                        got = self._checked(step, got)
            except StepFailed:
                raise
            except Exception as e:
                raise StepFailed(step.name, e) from e
            values[step.out] = got
            for k in step.frees:
                values[k] = None
        return [values[slot] for slot, _, _ in self.returned]

    def _checked(self, step: _Step, got: Any) -> Any:
        """Steps that follow rely on the layout that was predicted. What differs once is laid out anew each time."""
        wanted = step.results
        if isinstance(wanted, tuple) and isinstance(got, torch.Tensor):
            size, stride, _, dtype, _ = wanted[1]
            if got.shape != size or got.dtype != dtype:
                raise StepFailed(
                    step.name,
                    RuntimeError(
                        f"gives {tuple(got.shape)} {got.dtype} where {size} {dtype} was predicted; please report this"
                    ),
                )
            if got.stride() != stride and got.numel() > 1 and wanted[0] >= self.held:
                return torch.empty_strided(size, stride, dtype=dtype, device=got.device).copy_(got)
        step.checked = True
        return got


#: Operators that a function of PyTorch's resolves to whatever else it is overloaded for, called with two tensors.
_OF_TENSORS = frozenset(["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"])


def _direct(op: Any) -> Any:
    """The same kernel through PyTorch's own binding, which costs a third less than an operator looked up by name."""
    if not isinstance(op, torch._ops.OpOverload):
        return op
    name, overload = op._schema.name.split("::")[1], op._overloadname
    others = {o for o in op.overloadpacket.overloads() if not o.endswith("out")} - {overload}
    if others if overload == "default" else f"{name}.{overload}" not in _OF_TENSORS:
        return op
    return getattr(torch._C._VariableFunctions, name, op)


class StepFailed(RuntimeError):
    """An operator within a graph failed."""

    def __init__(self, name: str, reason: Exception) -> None:
        super().__init__(str(reason))
        self.name = name
        self.reason = reason


def _only(k: int) -> Callable[[list], tuple]:
    return lambda values: (values[k],)


def refs_as(value: Any, values: Sequence[Any]) -> Any:
    """``value`` with what ``values`` holds in the places that name an earlier step."""
    kind = type(value)
    if kind is _Ref:
        return values[value.k]
    if kind is list:
        return [refs_as(v, values) for v in value]
    return value


def _refs(values: list) -> set[int]:
    found: set[int] = set()
    for value in values:
        if type(value) is _Ref:
            found.add(value.k)
        elif type(value) is list:
            found |= _refs(value)
    return found


def _numbers(results: Any) -> list[int]:
    if results is None:
        return []
    if isinstance(results, tuple):
        return [results[0]]
    return [n for r in results for n in _numbers(r)]


def _end(geom: Geometry) -> int:
    size, stride, offset, dtype, _ = geom
    if 0 in size:
        return 0
    return (offset + sum((s - 1) * t for s, t in zip(size, stride)) + 1) * dtype.itemsize
