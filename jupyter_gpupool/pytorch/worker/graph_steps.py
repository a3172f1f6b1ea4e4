"""A graph as the worker runs it: decoded and checked once, then run operator by operator."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.sizes import rounded
from jupyter_gpupool.pytorch.torch_internals.worker import OpOverload, functions

from .allowed_operators import OperatorRefused, resolve
from .device import Device
from .templates import BadRecord, Geometry, Scope, decode_constant, is_repeatable, writes_undeclared

#: The most steps of a graph; a compiler makes fewer.
MAX_STEPS = 200_000


class _Step:
    """One operator: where its arguments are in the table of values, and where its result goes."""

    __slots__ = (
        *("name", "op", "kernel", "replaced", "args", "kwargs"),
        *("out", "frees", "results", "uses", "checked", "pick", "is_repeatable"),
    )

    def __init__(self, name: str, op: Any, args: list[Any], kwargs: dict[str, Any], out: int) -> None:
        self.name, self.op, self.args, self.kwargs, self.out = name, op, args, kwargs, out
        #: the operator itself, and whether another function replaces it here
        self.kernel = op
        self.replaced = False
        self.frees: list[int] = []
        self.results: Any = None
        self.uses = sorted(_refs([*args, *kwargs.values()]))
        self.checked = False
        self.pick: Any = None
        #: whether it changes nothing but its results
        self.is_repeatable = True


class _Ref:
    __slots__ = ("k",)

    def __init__(self, k: int) -> None:
        self.k = k


class GraphSteps:
    """A resolved definition from compile/graphs.py. Raises BadRecord for an invalid one."""

    def __init__(self, scope: Scope, definition: Any) -> None:
        self.definition = definition
        try:
            self.inputs: list[Geometry] = [scope.geometry(g) for g in definition["inputs"]]
            self.returned: list[tuple[int, Geometry, int]] = [
                (int(slot), scope.geometry(geom), int(nbytes))
                for slot, geom, nbytes in definition["returned"]
            ]
            #: the number of storages that the inputs are on; their numbers come first
            self.held = int(definition["held"])
            self.device: Device = scope.device(self.inputs[0][4]) if self.inputs else scope.home
            if any(scope.device(g[4]) is not self.device for g in self.inputs):
                raise BadRecord("a graph on several devices")
            self._scope = scope
            self._storages: dict[int, int] = {}
            self.wants_inductor = definition["inductor"]
            self.wants_recording = definition.get("record") is not False
            steps = definition["steps"]
            if len(steps) > MAX_STEPS:
                raise BadRecord(f"a graph of {len(steps)} operators")
            self.refused = ""
            #: whether a call writes to its inputs, or may
            self.writes = False
            #: the inputs that it writes to, or may
            self.written: set[int] = set()
            #: by position in the table of values: the inputs whose memory each value may be on
            self._origins: list[set[int]] = [{k} for k in range(len(self.inputs))]
            self.steps = [self._step(k, step) for k, step in enumerate(steps, len(self.inputs))]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise BadRecord(f"an invalid graph: {e}") from None
        self.n_values = len(self.inputs) + len(self.steps)
        if any(not 0 <= slot < self.n_values for slot, _, _ in self.returned):
            raise BadRecord("a graph that returns what it does not have")
        self.is_repeatable = all(step.is_repeatable for step in self.steps)
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
            step.is_repeatable = kernel is not None and is_repeatable(kernel)
        step.results = self._decode_results(results)
        self._trace_memory(step)
        return step

    def _trace_memory(self, step: _Step) -> None:
        """Note which inputs a step writes to, and which its result may be on."""
        schema = getattr(step.kernel, "_schema", None)
        used: set[int] = set().union(*(self._origins[k] for k in step.uses))
        if schema is not None and writes_undeclared(step.kernel):
            self.written |= used
        elif schema is not None and schema.is_mutable:
            given = [*zip(schema.arguments, step.args)]
            given += [(a, step.kwargs[a.name]) for a in schema.arguments if a.name in step.kwargs]
            for argument, value in given:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written |= set().union(*(self._origins[k] for k in _refs([value])))
        on_inputs = any(number < self.held for number in _numbers(step.results))
        self._origins.append(used if on_inputs else set())

    def _operator(self, name: str) -> tuple[Any, Any]:
        """The operator of that name, and what this device runs for it."""
        try:
            kernel = resolve(name)
        except OperatorRefused as e:
            self.refused = self.refused or str(e)  # calls report it; the session is kept
            return None, None
        self.writes = self.writes or kernel._schema.is_mutable or writes_undeclared(kernel)
        return kernel, self.device.kernel(kernel, kernel)

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
        """The most bytes that the graph has allocated at once while it runs, results included."""
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
        """Run the graph, and return the results in the order of ``returned``. Raises StepFailed."""
        if self.refused:
            raise OperatorRefused(self.refused)
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

    def is_apart(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether no input that it writes to is on memory of another one: code that was compiled relies on that."""
        if not self.written:
            return True
        places = [t.untyped_storage().data_ptr() for t in tensors]
        return all(places.count(places[k]) == 1 for k in self.written)

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
        """A step's result in the predicted layout, which later steps rely on.

        A step whose layout differs once is checked, and copied, at every call.
        """
        wanted = step.results
        if isinstance(wanted, tuple) and isinstance(got, torch.Tensor):
            size, stride, _, dtype, _ = wanted[1]
            if got.shape != size or got.dtype != dtype:
                raise StepFailed(
                    step.name,
                    RuntimeError(
                        f"the result is {tuple(got.shape)} {got.dtype}, but {size} {dtype} was predicted; "
                        "please report this"
                    ),
                )
            if got.stride() != stride and got.numel() > 1 and wanted[0] >= self.held:
                return torch.empty_strided(size, stride, dtype=dtype, device=got.device).copy_(got)
        step.checked = True
        return got


#: Operators to which PyTorch's function of that name resolves for two tensors, whatever its other overloads.
_OF_TENSORS = frozenset(["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"])


def _direct(op: Any) -> Any:
    """The same kernel through PyTorch's own binding, which costs a third less than a call of the operator."""
    if not isinstance(op, OpOverload):
        return op
    name, overload = op._schema.name.split("::")[1], op._overloadname
    others = {o for o in op.overloadpacket.overloads() if not o.endswith("out")} - {overload}
    if others if overload == "default" else f"{name}.{overload}" not in _OF_TENSORS:
        return op
    return getattr(functions, name, op)


class StepFailed(RuntimeError):
    """An operator within a graph failed."""

    def __init__(self, name: str, reason: Exception) -> None:
        super().__init__(str(reason))
        self.name = name
        self.reason = reason


def _only(k: int) -> Callable[[list[Any]], tuple[Any, ...]]:
    return lambda values: (values[k],)


def refs_as(value: Any, values: Sequence[Any]) -> Any:
    """``value`` with the results of earlier steps in place of references to them."""
    kind = type(value)
    if kind is _Ref:
        return values[value.k]
    if kind is list:
        return [refs_as(v, values) for v in value]
    return value


def _refs(values: list[Any]) -> set[int]:
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
