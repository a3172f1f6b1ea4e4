"""What a call of an operator will give, predicted once for each of its signatures.

A signature is the operator with the geometry of every tensor and the value of every argument but
floats. The first time one is seen it is inferred on meta tensors; from then on a call costs a
dictionary look-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import names, shapes
from .tensor import Geometry, RemoteTensor, dtype_name, geometry


class Unpredictable(Exception):
    """Only running the operator tells what it gives."""


class Unsupported(RuntimeError):
    """The device does not take such an argument."""


# What each result of a call is: a new storage, one of the arguments, a view of one, or a list.


class New(NamedTuple):
    geometry: Geometry


class Same(NamedTuple):
    tensor: int


class View(NamedTuple):
    tensor: int
    geometry: Geometry


class Prediction(NamedTuple):
    """``results`` is one of the above, None, or a tuple or list of them."""

    results: Any
    new: tuple[Geometry, ...]

    @property
    def is_local(self) -> bool:
        """Nothing but views: the worker need not know."""
        return not self.new and _only_views(self.results)


def _only_views(results: Any) -> bool:
    if isinstance(results, View):
        return True
    return type(results) in (tuple, list) and bool(results) and all(_only_views(r) for r in results)


def predict(func: Any, args: tuple, kwargs: dict, tensors: list[RemoteTensor]) -> Prediction:
    """Infer the results of ``func``. ``tensors`` are the remote tensors in order of appearance.

    Raises :class:`Unpredictable` where the values decide, or where no meta kernel exists.
    """
    plain = shapes.geometry_of(func, args, kwargs)
    if plain is not None:
        return Prediction(New(plain), (plain,))
    # No closures below: one that calls itself is a cycle, which would keep tensors until the next collection.
    metas: dict[int, torch.Tensor] | None = {} if func._schema.is_mutable else None
    try:
        got = func(*[on_meta(a, metas) for a in args], **{k: on_meta(v, metas) for k, v in kwargs.items()})
    except Exception as e:
        # No meta kernel, or one that needs values; or the user's mistake: running it tells, in the real kernel's words.
        raise Unpredictable(str(e)) from None

    for value in tensors:
        meta = metas.get(id(value)) if metas else None
        if meta is not None and (
            meta.shape != value._geometry.size or meta.stride() != value._geometry.stride
        ):
            raise Unpredictable("changes the geometry of an argument")
    return _Description(func._schema, args, kwargs, tensors).of(got)


def on_meta(value: Any, metas: dict[int, torch.Tensor] | None) -> Any:
    """``value`` with meta tensors in it; fresh ones where ``metas`` collects them (they may be changed)."""
    if type(value) is RemoteTensor:
        if metas is None:
            return value._geometry.on_meta()
        return metas.setdefault(id(value), value._geometry.new_meta())
    if isinstance(value, (list, tuple)):
        return [on_meta(v, metas) for v in value]
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, torch.Generator):
        return None
    return value


#: The alias set of a list of views, which has no name in the schema: of the argument that goes into a list.
_PARTS = ""


class _Description:
    """Turns what the meta kernels gave into a :class:`Prediction`."""

    def __init__(self, schema: Any, args: tuple, kwargs: dict, tensors: list[RemoteTensor]) -> None:
        self._returns = schema.returns
        self._tensors = tensors
        self._index, self._cuda = _where(args, kwargs, tensors)
        self._positions = _aliased(schema, args, kwargs, tensors)
        self._new: list[Geometry] = []

    def of(self, got: Any) -> Prediction:
        returns = self._returns
        if not returns:
            return Prediction(None, ())
        if len(returns) == 1:
            results = self._describe(got, returns[0].alias_info)
        else:
            results = tuple(self._describe(v, r.alias_info) for v, r in zip(got, returns))
        return Prediction(results, tuple(self._new))

    def _describe(self, value: Any, alias: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            return [self._describe(v, alias) for v in value]
        if not isinstance(value, torch.Tensor):
            raise Unpredictable("gives a value that is no tensor")
        if alias is None:
            geom = geometry(value.shape, value.stride(), 0, value.dtype, self._index, self._cuda)
            self._new.append(geom)
            return New(geom)
        k = self._positions.get(next(iter(alias.before_set), _PARTS))
        if k is None:
            raise Unpredictable("aliases an argument that is no tensor")
        if alias.is_write:
            return Same(k)
        source = self._tensors[k]._geometry
        return View(
            k,
            geometry(
                value.shape,
                value.stride(),
                int(value.storage_offset()),
                value.dtype,
                source.index,
                source.cuda,
            ),
        )


def _where(args: tuple, kwargs: dict, tensors: list[RemoteTensor]) -> tuple[int, bool]:
    """Device index and name of new results: what is asked for, else where the first tensor is."""
    wanted = kwargs.get("device")
    first = tensors[0]._geometry if tensors else None
    cuda = names.says_cuda(wanted) or (first is not None and first.cuda)
    index = names.slice_index(wanted) if wanted is not None else None
    if index is None:
        index = first.index if first is not None else names.current_index()
    return index, cuda


def _aliased(schema: Any, args: tuple, kwargs: dict, tensors: list[RemoteTensor]) -> dict[str, int]:
    """Alias set name → position in ``tensors`` of the argument that carries it."""
    order = {id(t): k for k, t in reversed(list(enumerate(tensors)))}
    found: dict[str, int] = {}
    for n, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        value = args[n] if n < len(args) else kwargs.get(argument.name)
        if type(value) is RemoteTensor:
            for name in argument.alias_info.before_set:
                found[name] = order[id(value)]
            if "*" in argument.alias_info.after_set:
                found[_PARTS] = order[id(value)]
    return found


class Definition:
    """A call's structure as the worker is told it: arguments with holes for tensors and scalars.

    Tagged lists stand for what msgpack cannot say: ``["t", k, geometry]`` a tensor, ``["s", k]`` a
    scalar that varies, ``["c", k, dtype]`` a zero-dimensional CPU tensor made of one, ``["l", […]]``
    a list, ``["d", name]`` a dtype, ``["D", index]`` a device, ``["L", name]`` a layout,
    ``["m", name]`` a memory format, ``["z", re, im]`` a complex number, ``["g", k]`` a
    generator whose number is that scalar.
    """

    def __init__(self, func: Any, args: tuple, kwargs: dict, default_index: int) -> None:
        self._tensor = self._scalar = 0
        self._index = default_index
        self.operator = f"{func._schema.name}.{func._overloadname}"
        self.args = [self._encode(a) for a in args]
        self.kwargs = {k: self._encode(v) for k, v in kwargs.items()}

    def wire(self, results: Any) -> dict[str, Any]:
        return {
            "op": self.operator,
            "args": self.args,
            "kwargs": self.kwargs,
            "tensors": self._tensor,
            "scalars": self._scalar,
            "results": _wire_results(results),
        }

    def _encode(self, value: Any) -> Any:
        kind = type(value)
        if kind is RemoteTensor:
            self._tensor += 1
            return ["t", self._tensor - 1, value._geometry.wire()]
        if kind is float:
            self._scalar += 1
            return ["s", self._scalar - 1]
        if kind is list or kind is tuple or kind is torch.Size:
            return ["l", [self._encode(v) for v in value]]
        if kind is torch.device:
            index = names.slice_index(value)
            if index is None:
                raise Unsupported(f"{self.operator} cannot mix a gpupool device with {value}")
            return ["D", index]
        if isinstance(value, torch.Generator):
            self._scalar += 1
            return ["g", self._scalar - 1]
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            self._scalar += 1
            return ["c", self._scalar - 1, dtype_name(value.dtype)]
        try:
            return encode_constant(value)
        except Unsupported:
            raise Unsupported(
                f"{self.operator} on the gpupool device does not take a {kind.__name__}"
            ) from None


def encode_constant(value: Any) -> Any:
    """A value that is the same at every call, as :class:`Definition` tags it. Raises Unsupported."""
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if kind is torch.dtype:
        return ["d", dtype_name(value)]
    if kind is torch.layout:
        return ["L", str(value)[6:]]
    if kind is torch.memory_format:
        return ["m", str(value)[6:]]
    if kind is complex:
        return ["z", value.real, value.imag]
    raise Unsupported(f"a {kind.__name__}")


def _wire_results(results: Any) -> Any:
    if isinstance(results, New):
        return results.geometry.wire()
    if isinstance(results, (Same, View)) or results is None:
        return None
    return ["l", [_wire_results(r) for r in results]]
