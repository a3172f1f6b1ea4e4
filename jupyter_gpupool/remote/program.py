"""What a session's definitions mean in the worker: resolved operators with holes for tensors and scalars."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .emulation import CPU_KERNELS
from .rules import NotAllowed, resolve
from .slices import Device

#: size, stride, offset, dtype, device index; as a worker keeps what signature.py sends
Geometry = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, int]


class BadRecord(Exception):
    """The client sent something that no client of ours sends; the session ends."""


class Scope(Protocol):
    """Where the names in a definition are looked up."""

    #: where a call without tensors is done
    home: Device

    def device(self, index: Any) -> Device: ...

    def geometry(self, wire: Any) -> Geometry: ...

    def generator(self, number: Any) -> torch.Generator: ...


class Template:
    """A definition, resolved: the operator, its constants, and where tensors and scalars go."""

    def __init__(self, scope: Scope, definition: dict[str, Any]) -> None:
        self.name = definition["op"]
        try:
            self.op = op = resolve(self.name)
        except NotAllowed as e:
            # Whoever calls it is told; the session and its tensors live on.
            self.op, op = functools.partial(_refuse, str(e)), None
        self.n_tensors = int(definition["tensors"])
        self.n_scalars = int(definition["scalars"])
        self._scope = scope
        self.geometries: dict[int, Geometry] = {}
        self.args = [self._decode(a) for a in definition["args"]]
        self.kwargs = {str(k): self._decode(v) for k, v in definition["kwargs"].items()}
        self.results = self._decode_results(definition["results"])
        self.new = flat_new(self.results)
        self.size = self.n_tensors + self.n_scalars + len(self.new)
        self.random = op is not None and torch.Tag.nondeterministic_seeded in op.tags
        self.checked = False
        if set(self.geometries) != set(range(self.n_tensors)):
            raise BadRecord(f"{self.name}: tensors are not numbered from 0 to {self.n_tensors - 1}")
        first = self.geometries.get(0) or (self.new[0] if self.new else None)
        self.device = scope.device(first[4]) if first else scope.home
        if self.device.spec.emulated:
            self.op = CPU_KERNELS.get(op, self.op)
        if (
            op is not None
            and op._schema.is_mutable
            and any(g[3].is_complex for g in self.geometries.values())
        ):
            self.op = functools.partial(_conjugated_in_memory, self.op)

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

    def fill(self, tensors: Sequence[torch.Tensor], scalars: Sequence[Any]) -> tuple[list, dict]:
        return (
            [_fill(a, tensors, scalars) for a in self.args],
            {k: _fill(v, tensors, scalars) for k, v in self.kwargs.items()} if self.kwargs else {},
        )


def decode_constant(scope: Scope, value: Any) -> Any:
    """What signature.encode_constant said, or a device. Raises :class:`BadRecord`."""
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


def flat_new(results: Any) -> list[Geometry]:
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
    return _named(torch.dtype, name)


def _conjugated_in_memory(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Some kernels leave ``out=`` to be read as its conjugate, by a bit that only this process would know of."""
    got = op(*args, **kwargs)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_conj():
            torch._C._set_conj(value, False)
            value.conj_physical_()
    return got


def _refuse(reason: str, *args: Any, **kwargs: Any) -> None:
    raise NotAllowed(reason)


def pair(results: Any, got: Any) -> list[tuple[Geometry, Any]]:
    pairs: list[tuple[Geometry, Any]] = []
    for r, value in zip(results, got):
        if isinstance(r, tuple):
            pairs.append((r, value))
        elif r is not None:
            pairs.extend(pair(r, value))
    return pairs


def numel(geom: Geometry) -> int:
    n = 1
    for s in geom[0]:
        n *= s
    return n


def nbytes_of(geom: Geometry) -> int:
    if not numel(geom):
        return 0
    return (geom[2] + sum((s - 1) * t for s, t in zip(geom[0], geom[1])) + 1) * geom[3].itemsize
