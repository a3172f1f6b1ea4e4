"""Decodes definitions of calls: resolved operators with holes for tensors and scalars."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from jupyter_gpupool.pytorch.protocol.recurrent import OPAQUE, RNN, RNN_BACKWARD
from jupyter_gpupool.pytorch.protocol.sizes import rounded
from jupyter_gpupool.pytorch.torch_internals.worker import set_conj

from . import recurrent
from .accounts import Account
from .allowed_operators import OperatorRefused, resolve
from .device import Device

#: A tensor's layout as the worker keeps it: size, stride and offset in elements, dtype, device index.
Geometry = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, int]


#: What runs the operators of this package.
_OWN_KERNELS = {RNN: recurrent.rnn, RNN_BACKWARD: recurrent.rnn_backward}


#: Operators of such names write running statistics, or noise, without their schemas marking it.
_WRITES_UNDECLARED = ("batch_norm", "instance_norm", "rrelu", "fake_quant", "moving_avg")


class BadRecord(Exception):
    """The client sent something that is no valid command. The session ends."""


class Scope(Protocol):
    """What the numbers and names in a definition refer to."""

    #: where a call without tensors runs
    home: Device

    def device(self, index: Any) -> Device:
        """The slice ``index`` of the lease. Raises :class:`BadRecord`."""

    def geometry(self, wire: Any) -> Geometry:
        """The layout that a command carries. Raises :class:`BadRecord`."""

    def generator(self, number: Any) -> torch.Generator:
        """The generator of that number. Raises :class:`BadRecord`."""


class Template:
    """A resolved definition: the operator, its constants, and holes for tensors and scalars."""

    def __init__(self, scope: Scope, definition: dict[str, Any]) -> None:
        self.definition = definition
        self.name = definition["op"]
        try:
            self.op = op = resolve(self.name)
        except OperatorRefused as e:
            # Calls of the template report it; the session and its tensors are kept.
            self.op, op = functools.partial(_refuse, str(e)), None
        self.n_tensors = int(definition["tensors"])
        self.n_scalars = int(definition["scalars"])
        self._scope = scope
        self.geometries: dict[int, Geometry] = {}
        self.args = [self._decode(a) for a in definition["args"]]
        self.kwargs = {str(k): self._decode(v) for k, v in definition["kwargs"].items()}
        self.results = self._decode_results(definition["results"])
        self.new = flat_new(self.results)
        #: the bytes of each new storage, and what all of them take
        self.new_bytes = tuple(map(nbytes_of, self.new))
        self.taken_bytes = sum(map(rounded, self.new_bytes))
        #: the positions of the tensors that a call writes to
        self.writes = self._writes(op)
        self.size = self.n_tensors + self.n_scalars + len(self.new)
        self.checked = False
        numbers = range(len(self.geometries))  # not a client's number, which may be any
        if len(numbers) != self.n_tensors or set(self.geometries) != set(numbers):
            raise BadRecord(f"{self.name}: tensors are not numbered from 0 to {self.n_tensors - 1}")
        #: the layouts of the tensors, in order
        self.layouts = tuple(self.geometries[k] for k in range(self.n_tensors))
        #: whether a result may be conjugated or negated lazily
        self.is_complex = any(g[3].is_complex for g in (*self.layouts, *self.new) if g[3] is not OPAQUE)
        self._plan = None if self.kwargs else _plan_of(self.args, self.n_tensors)
        first = self.geometries.get(0) or (self.new[0] if self.new else None)
        self.device = scope.device(first[4]) if first else scope.home
        #: where what it allocates is accounted for
        self.account: Account
        self.op = self.device.kernel(op, _OWN_KERNELS.get(op, self.op))
        #: the operator, if a call that has failed halfway has changed nothing
        self.repeatable = self.op if op is not None and is_repeatable(op) else None
        if (
            op is not None
            and op._schema.is_mutable
            and any(g[3].is_complex for g in self.geometries.values())
        ):
            self.op = functools.partial(_conjugated_in_memory, self.op)

    def _writes(self, op: Any) -> tuple[int, ...]:
        if op is None:
            return ()
        if writes_undeclared(op):
            return tuple(range(self.n_tensors))
        if not op._schema.is_mutable:
            return ()
        given = [*zip(op._schema.arguments, self.args)]
        given += [(a, self.kwargs[a.name]) for a in op._schema.arguments if a.name in self.kwargs]
        written: set[int] = set()
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= _tensor_holes(value)
        return tuple(sorted(written))

    def _decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return decode_constant(self._scope, value)
        tag, *rest = value
        if tag == "t":
            self.geometries[rest[0]] = self._scope.geometry(rest[1])
            return _Hole("tensors", rest[0])
        if tag == "s":
            return _Hole("scalars", rest[0])
        if tag == "c":
            return _Hole("scalars", rest[0], dtype_named(rest[1]))
        if tag == "l":
            return [self._decode(v) for v in rest[0]]
        if tag == "g":
            return _GeneratorHole(rest[0], self._scope)
        return decode_constant(self._scope, value)

    def _decode_results(self, value: Any) -> Any:
        if value is None:
            return None
        if value and value[0] == "l":
            return [self._decode_results(v) for v in value[1]]
        return self._scope.geometry(value)

    def fill(
        self, tensors: Sequence[torch.Tensor], scalars: Sequence[Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call with these tensors and scalars: (positional, by name)."""
        if self._plan is not None:
            values = (*tensors, *scalars)
            return [values[k] if is_hole else k for is_hole, k in self._plan], {}
        return (
            [_fill(a, tensors, scalars) for a in self.args],
            {k: _fill(v, tensors, scalars) for k, v in self.kwargs.items()} if self.kwargs else {},
        )


def _plan_of(args: list[Any], n_tensors: int) -> list[tuple[bool, Any]] | None:
    """Where each argument comes from: the position among tensors and scalars, or a constant.

    None if some have holes inside, or are converted.
    """
    plan: list[tuple[bool, Any]] = []
    for value in args:
        if type(value) is _Hole and value.dtype is None:
            plan.append((True, value.k if value.of == "tensors" else n_tensors + value.k))
        elif type(value) in (_Hole, _GeneratorHole, list):
            return None
        else:
            plan.append((False, value))
    return plan


def decode_geometry(wire: Any) -> Geometry:
    """Decode a layout, whose device it does not look at. Raises :class:`BadRecord`."""
    try:
        size, stride, offset, dtype, index = wire
        geom = (tuple(size), tuple(stride), int(offset), dtype_named(dtype), index)
        if len(geom[0]) != len(geom[1]) or min((*geom[0], *geom[1], geom[2]), default=0) < 0:
            raise ValueError("negative")
    except (TypeError, ValueError) as e:
        raise BadRecord(f"a geometry of {wire!r}: {e}") from None
    return geom


def decode_constant(scope: Scope, value: Any) -> Any:
    """Decode what prediction.encode_constant encoded, or a device. Raises :class:`BadRecord`."""
    if not isinstance(value, list):
        if value is None or isinstance(value, (bool, int, str)):
            return value
        raise BadRecord(f"an argument that is a {type(value).__name__}")
    tag, *rest = value
    if tag == "d":
        return dtype_named(rest[0])
    if tag == "D":
        return scope.device(rest[0]).torch_device
    if tag == "L":
        return _named(torch.layout, rest[0])
    if tag == "m":
        return _named(torch.memory_format, rest[0])
    if tag == "z":
        return complex(rest[0], rest[1])
    raise BadRecord(f"an argument tagged {tag!r}")


class _Hole:
    __slots__ = ("of", "k", "dtype")

    def __init__(self, of: str, k: int, dtype: torch.dtype | None = None) -> None:
        self.of, self.k, self.dtype = of, k, dtype


class _GeneratorHole:
    __slots__ = ("k", "scope")

    def __init__(self, k: int, scope: Scope) -> None:
        self.k, self.scope = k, scope


def _fill(value: Any, tensors: Sequence[torch.Tensor], scalars: Sequence[Any]) -> Any:
    if type(value) is _Hole:
        if value.of == "tensors":
            return tensors[value.k]
        scalar = scalars[value.k]
        return scalar if value.dtype is None else torch.tensor(scalar, dtype=value.dtype)
    if type(value) is _GeneratorHole:
        return value.scope.generator(scalars[value.k])
    if type(value) is list:
        return [_fill(v, tensors, scalars) for v in value]
    return value


def writes_undeclared(op: Any) -> bool:
    """Whether an operator may write to inputs that its schema does not mark."""
    return any(word in op._schema.name for word in _WRITES_UNDECLARED)


def is_repeatable(op: Any) -> bool:
    """Whether a call of an operator that has failed halfway has changed nothing, so that it can be made again."""
    return not (
        op._schema.is_mutable or writes_undeclared(op) or torch.Tag.nondeterministic_seeded in op.tags
    )


def _tensor_holes(value: Any) -> set[int]:
    if type(value) is _Hole:
        return {value.k} if value.of == "tensors" else set()
    if type(value) is list:
        return set().union(*(_tensor_holes(v) for v in value))
    return set()


def flat_new(results: Any) -> list[Geometry]:
    """The layouts of the new tensors among predicted results, in order."""
    if results is None:
        return []
    if isinstance(results, tuple):
        return [results]
    return [g for r in results for g in flat_new(r)]


def _named(kind: type, name: Any) -> Any:
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(value, kind):
        raise BadRecord(f"{name!r} is no {kind.__name__}")
    return value


def dtype_named(name: Any) -> torch.dtype:
    """``"float32"`` → ``torch.float32``. Raises :class:`BadRecord`."""
    dtype: torch.dtype = _named(torch.dtype, name)
    return dtype


def _conjugated_in_memory(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` and conjugate ``out=`` in memory: some kernels set a bit instead, which the client does not get."""
    got = op(*args, **kwargs)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_conj():
            set_conj(value, False)
            value.conj_physical_()
    return got


def _refuse(reason: str, *args: Any, **kwargs: Any) -> None:
    raise OperatorRefused(reason)


def pair(results: Any, got: Any) -> list[tuple[Geometry, Any]]:
    """Each new tensor among the results ``got``, with its predicted layout."""
    pairs: list[tuple[Geometry, Any]] = []
    for r, value in zip(results, got):
        if isinstance(r, tuple):
            pairs.append((r, value))
        elif r is not None:
            pairs.extend(pair(r, value))
    return pairs


def numel(geom: Geometry) -> int:
    """The number of elements."""
    n = 1
    for s in geom[0]:
        n *= s
    return n


def nbytes_of(geom: Geometry) -> int:
    """Bytes from a storage's start to the end of the tensor's last element, 0 if it has none."""
    if not numel(geom):
        return 0
    return (geom[2] + sum((s - 1) * t for s, t in zip(geom[0], geom[1])) + 1) * geom[3].itemsize
