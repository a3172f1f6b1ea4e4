"""Predicts the results of a call of an operator, once for each signature.

A signature is the operator, the layout of every tensor (size, stride, offset, dtype, device) and the
value of every other argument but floats. The first call of a signature is inferred on meta tensors. Later
calls cost a dictionary look-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor, TensorLayout, dtype_name, geometry

from . import shape_rules


class Unpredictable(Exception):
    """The results are known only when the operator has run."""


class Unsupported(RuntimeError):
    """The device does not accept such an argument."""


# What a result of a call is. ``tensor`` counts the call's remote tensors in order of appearance, from 0.


class NewResult(NamedTuple):
    """A tensor of this layout on a storage of its own."""

    geometry: TensorLayout


class SameResult(NamedTuple):
    """An argument itself, as of in-place operators."""

    tensor: int


class ViewResult(NamedTuple):
    """A tensor of this layout on the storage of an argument."""

    tensor: int
    geometry: TensorLayout


class Prediction(NamedTuple):
    """The results of a call: ``results`` is one of the above, None, or a tuple or list of them.

    ``new`` has the layouts of the new tensors among them, in order.
    """

    results: Any
    new: tuple[TensorLayout, ...]

    @property
    def is_local(self) -> bool:
        """Whether all results are views: then nothing is sent to the worker."""
        return not self.new and _only_views(self.results)


def _only_views(results: Any) -> bool:
    if isinstance(results, ViewResult):
        return True
    return type(results) in (tuple, list) and bool(results) and all(_only_views(r) for r in results)


def predict(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[RemoteTensor]
) -> Prediction:
    """Infer shapes, strides and dtypes of the results of ``func(*args, **kwargs)``.

    The arguments may hold remote tensors of any shape and dtype. ``tensors`` are those tensors in order of
    appearance, also from within lists. New results are on the slice that ``device=`` names, else on that of
    the first tensor, with the shapes, strides and dtypes that the operator's meta kernel gives them.

    Raises :class:`Unpredictable` if the results depend on elements (``nonzero``, boolean masks), if the
    operator has no meta kernel, or if it changes the layout of an argument.
    """
    plain = shape_rules.layouts_of(func, args, kwargs)
    if isinstance(plain, tuple) and not isinstance(plain, TensorLayout):
        new = tuple(layout for layout in plain if layout is not None)
        return Prediction(tuple(None if layout is None else NewResult(layout) for layout in plain), new)
    if plain is not None:
        return Prediction(NewResult(plain), (plain,))
    if shape_rules.changes_elements_only(func, args, kwargs):
        return Prediction(None, ())
    # No closures below: a recursive one is a cycle, and keeps its tensors until the next garbage collection.
    metas: dict[int, torch.Tensor] | None = {} if func._schema.is_mutable else None
    try:
        got = func(*[on_meta(a, metas) for a in args], **{k: on_meta(v, metas) for k, v in kwargs.items()})
    except Exception as e:
        # No meta kernel, one that needs elements, or a mistake of the user's: then the real kernel's error is better.
        raise Unpredictable(str(e)) from None

    for value in tensors:
        meta = metas.get(id(value)) if metas else None
        if meta is not None and (
            meta.shape != value._geometry.size or meta.stride() != value._geometry.stride
        ):
            raise Unpredictable("it changes the layout of an argument")
    return _Description(func._schema, args, kwargs, tensors).of(_wanted(func._schema, args, kwargs, got))


def _wanted(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], got: Any) -> Any:
    """Results without those that ``output_mask`` leaves out: real kernels leave them out, some meta kernels do not."""
    for n, argument in enumerate(schema.arguments):
        if argument.name == "output_mask":
            mask = args[n] if n < len(args) else kwargs.get(argument.name)
            if mask is not None and isinstance(got, tuple) and len(mask) == len(got):
                return tuple(value if wanted else None for value, wanted in zip(got, mask))
    return got


def on_meta(value: Any, metas: dict[int, torch.Tensor] | None) -> Any:
    """``value`` with a meta tensor of the same size, stride, offset and dtype for every remote tensor.

    With ``metas``, a dictionary from ``id(tensor)``, each is a new tensor that the operator may change, and
    is added to it. Without, layouts share theirs.
    """
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


#: Stands for the alias set of a list of views, which has no name in the schema.
_PARTS = ""


class _Description:
    """Turns the results of a meta kernel into a :class:`Prediction`."""

    def __init__(
        self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[RemoteTensor]
    ) -> None:
        self._returns = schema.returns
        self._tensors = tensors
        self._index, self._cuda = _where(args, kwargs, tensors)
        self._positions = _aliased(schema, args, kwargs, tensors)
        self._new: list[TensorLayout] = []

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
            raise Unpredictable("it returns something else than tensors")
        if value.layout is not torch.strided:
            raise Unpredictable("it returns a sparse tensor")
        if alias is None:
            geom = geometry(value.shape, value.stride(), 0, value.dtype, self._index, self._cuda)
            self._new.append(geom)
            return NewResult(geom)
        k = self._positions.get(next(iter(alias.before_set), _PARTS))
        if k is None:
            raise Unpredictable("a result is a view of something else than a tensor")
        if alias.is_write:
            return SameResult(k)
        source = self._tensors[k]._geometry
        return ViewResult(
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


def _where(args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[RemoteTensor]) -> tuple[int, bool]:
    """The slice of new results and whether it is named ``cuda``: by ``device=``, else by the first tensor."""
    wanted = kwargs.get("device")
    first = tensors[0]._geometry if tensors else None
    cuda = device_names.says_cuda(wanted) or (first is not None and first.cuda)
    index = device_names.slice_index(wanted) if wanted is not None else None
    if index is None:
        index = first.index if first is not None else device_names.current_index()
    return index, cuda


def _aliased(
    schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[RemoteTensor]
) -> dict[str, int]:
    """Name of an alias set → position in ``tensors`` of the argument that belongs to it."""
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
    """The structure of a call as the worker receives it: its arguments with holes for tensors and scalars.

    Tagged lists stand for what msgpack has no type for:

    - ``["t", k, layout]``: the tensor number k, with its :meth:`TensorLayout.wire`
    - ``["s", k]``: the scalar number k, which varies from call to call
    - ``["c", k, dtype]``: a zero-dimensional CPU tensor of that dtype made of scalar k
    - ``["g", k]``: the generator whose number is scalar k
    - ``["l", […]]``: a list
    - ``["d", name]``: a dtype; ``["L", name]``: a torch.layout; ``["m", name]``: a memory format
    - ``["D", index]``: a device
    - ``["z", re, im]``: a complex number
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], default_index: int) -> None:
        self._tensor = self._scalar = 0
        self._index = default_index
        self.operator = f"{func._schema.name}.{func._overloadname}"
        self.args = [self._encode(a) for a in args]
        self.kwargs = {k: self._encode(v) for k, v in kwargs.items()}

    def wire(self, results: Any) -> dict[str, Any]:
        """What DEFINE and RUN carry; ``results`` are those of a :class:`Prediction`, None for RUN."""
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
            index = device_names.slice_index(value)
            if index is None:
                raise Unsupported(
                    f"{self.operator} cannot combine a tensor on a leased GPU with the device {value}; "
                    "move the tensor there with .to() first"
                )
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
                f"{self.operator} does not accept an argument of type {kind.__name__} on a leased GPU; "
                "call it with CPU tensors, or without that argument"
            ) from None


def encode_constant(value: Any) -> Any:
    """A value that is part of the signature, tagged as by :class:`Definition`. Raises :class:`Unsupported`."""
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
    if isinstance(results, NewResult):
        return results.geometry.wire()
    if isinstance(results, (SameResult, ViewResult)) or results is None:
        return None
    return ["l", [_wire_results(r) for r in results]]
