"""Every operator on a remote tensor comes through here: look up its signature, send it, go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import composites, mixing, signature, stand_ins
from .records import DEFINE, RESET, RUN
from .signature import Definition, New, Prediction, Same, View
from .stream import Stream, ids
from .tensor import Geometry, RemoteTensor, Storage, forget_geometries, geometry, make, make_view

aten = torch.ops.aten

#: More signatures than this and all are forgotten: a bound on memory for programs whose shapes never repeat.
MAX_TEMPLATES = 20_000

#: Operators that are not one call in the worker: func → handler(dispatcher, args, kwargs).
SPECIAL: dict[Any, Callable[[Dispatcher, tuple, dict], Any]] = {}


def special(*funcs: Any) -> Callable:
    """Decorates the handler of operators that are not one call in the worker."""

    def register(handler: Callable) -> Callable:
        for func in funcs:
            SPECIAL[func] = handler
        return handler

    return register


def fits_outputs(function: Callable) -> Callable:
    """Decorates what makes room in the ``out=`` tensors of a call; it says whether any was needed."""
    global _fit_outputs
    _fit_outputs = function
    return function


def _fit_outputs(d: Dispatcher, func: Any, args: tuple, kwargs: dict) -> bool:
    return False


def fills_outputs(function: Callable) -> Callable:
    """Decorates what runs a call without its ``out=`` tensors and copies into them (or says NotImplemented)."""
    global _fill_outputs
    _fill_outputs = function
    return function


def _fill_outputs(d: Dispatcher, func: Any, args: tuple, kwargs: dict) -> Any:
    return NotImplemented


class _Mark:
    """Stands in a key for a kind of argument whose value is not part of the signature, or to keep
    values apart that Python calls equal (1, 1.0 and True)."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_FLOAT, _TRUE, _FALSE, _LIST, _END, _GENERATOR = map(_Mark, ("float", "True", "False", "[", "]", "generator"))


class Foreign(Exception):
    """An argument is a tensor of another device, with elements."""


class Template:
    """A predicted call: what to send and what to give back."""

    __slots__ = ("id", "geometry", "same", "view", "prediction")

    def __init__(self, id: int, prediction: Prediction) -> None:
        self.id = id
        self.prediction = prediction
        results = prediction.results
        #: the three commonest shapes of a prediction, unpacked for the fast path
        self.geometry: Geometry | None = results.geometry if isinstance(results, New) else None
        self.same: int | None = results.tensor if isinstance(results, Same) else None
        self.view: Geometry | None = results.geometry if isinstance(results, View) else None


class Dispatcher:
    """Turns operator calls of one process into records of one stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._home = next(iter(stream.memory))
        self.templates: dict[tuple, Template] = {}
        self._defined = 0
        self._defining = threading.RLock()
        self.misses = 0

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        special = SPECIAL.get(func)
        if special is not None:
            return special(self, args, kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Call ``func`` in the worker as it stands."""
        key: list[Any] = [func]
        tensors: list[RemoteTensor] = []
        scalars: list[Any] = []
        try:
            for value in args:
                kind = type(value)
                if kind is RemoteTensor:
                    key.append(value._geometry)
                    tensors.append(value)
                elif kind is float:
                    key.append(_FLOAT)
                    scalars.append(value)
                elif kind is int or value is None:
                    key.append(value)
                else:
                    _flatten(value, key, tensors, scalars)
            if kwargs:
                for name, value in kwargs.items():
                    key.append(name)
                    _flatten(value, key, tensors, scalars)
        except Foreign:
            apart = composites.parts(func)
            if apart is not None:
                SPECIAL[func] = apart
                return apart(self, args, kwargs)
            return self.run(func, *mixing.bring(func, args, kwargs))

        signature_key = tuple(key)
        template = self.templates.get(signature_key)
        if template is None:
            apart = composites.parts(func)
            if apart is not None:
                SPECIAL[func] = apart
                return apart(self, args, kwargs)
            made = self._define(func, args, kwargs, signature_key, tensors)
            if made is None:
                if func._schema.is_mutable:
                    if _fit_outputs(self, func, args, kwargs):
                        return self.run(func, args, kwargs)
                    filled = _fill_outputs(self, func, args, kwargs)
                    if filled is not NotImplemented:
                        return filled
                return self._run_now(func, args, kwargs, tensors, scalars)
            template = made

        geom = template.geometry
        if geom is not None:
            stream = self.stream
            storage = stream.new_storage(geom.nbytes, geom.index)
            stream.sites.made(storage.id)
            stream.push((template.id, *[t._storage.id for t in tensors], *scalars, storage.id))
            return make(storage, geom)
        same = template.same
        if same is not None:
            self.stream.sites.changed(tensors[same]._storage.id, func)
            self.stream.push((template.id, *[t._storage.id for t in tensors], *scalars))
            return tensors[same]
        geom = template.view
        if geom is not None:
            return make_view(tensors[template.prediction.results.tensor], geom)
        return self._general(template, tensors, scalars)

    def _general(self, template: Template, tensors: list[RemoteTensor], scalars: list) -> Any:
        prediction = template.prediction
        storages = [self.stream.new_storage(g.nbytes, g.index) for g in prediction.new]
        if not prediction.is_local:
            inputs = [t._storage.id for t in tensors]
            if storages:
                self.stream.sites.made(storages[0].id)
            self.stream.push((template.id, *inputs, *scalars, *[s.id for s in storages]))
        return _build(prediction.results, tensors, iter(storages))

    # -- the first time

    def _define(
        self, func: Any, args: tuple, kwargs: dict, key: tuple, tensors: list[RemoteTensor]
    ) -> Template | None:
        """Predict and remember; None when only running it will tell."""
        mixing.check(func, args, kwargs, tensors)
        try:
            prediction = signature.predict(func, args, kwargs, tensors)
        except signature.Unpredictable:
            return None
        with self._defining:  # another thread may meet its first call at the same moment
            return self.templates.get(key) or self._remember(func, args, kwargs, key, tensors, prediction)

    def _remember(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        key: tuple,
        tensors: list[RemoteTensor],
        prediction: Prediction,
    ) -> Template:
        self.misses += 1
        if len(self.templates) >= MAX_TEMPLATES:
            self.templates.clear()
            forget_geometries()
            self.stream.push((RESET,))
        template = Template(self._defined, prediction)
        if not prediction.is_local:
            self._defined += 1
            index = tensors[0]._geometry.index if tensors else self._home
            definition = Definition(func, args, kwargs, index).wire(prediction.results)
            self.stream.push((DEFINE, template.id, definition))
        self.templates[key] = template
        return template

    def _run_now(
        self, func: Any, args: tuple, kwargs: dict, tensors: list[RemoteTensor], scalars: list
    ) -> Any:
        """Run ``func`` and wait: its results depend on values, or it is about to fail."""
        index = tensors[0]._geometry.index if tensors else self._home
        cuda = any(t._geometry.cuda for t in tensors)
        definition = Definition(func, args, kwargs, index).wire(None)
        answer = self.stream.ask((RUN, definition, [t._storage.id for t in tensors], scalars, next(ids)))
        return self._receive(answer["results"], tensors, cuda)

    def _receive(self, result: Any, tensors: list[RemoteTensor], cuda: bool) -> Any:
        """Results as the worker describes them: see Session._run_now in executor.py."""
        if result is None:
            return None
        kind, *rest = result
        if kind == "list":
            return [self._receive(r, tensors, cuda) for r in rest[0]]
        if kind == "value":
            return rest[0]
        if kind == "same":
            return tensors[rest[0]]
        size, stride, offset, dtype, index = rest[1]
        geom = geometry(size, stride, offset, getattr(torch, dtype), index, cuda)
        if kind == "view":
            return make_view(tensors[rest[0]], geom)
        storage: Storage = self.stream.known_storage(rest[0], rest[2], index)
        return make(storage, geom)


def _build(result: Any, tensors: list[RemoteTensor], storages: Iterator[Storage]) -> Any:
    """What a call gives back, as its prediction says."""
    if isinstance(result, New):
        return make(next(storages), result.geometry)
    if isinstance(result, Same):
        return tensors[result.tensor]
    if isinstance(result, View):
        return make_view(tensors[result.tensor], result.geometry)
    if result is None:
        return None
    return type(result)([_build(r, tensors, storages) for r in result])


def _flatten(value: Any, key: list, tensors: list, scalars: list) -> None:
    kind = type(value)
    if kind is RemoteTensor:
        key.append(value._geometry)
        tensors.append(value)
    elif kind is float:
        key.append(_FLOAT)
        scalars.append(value)
    elif kind is bool:
        key.append(_TRUE if value else _FALSE)
    elif kind is list or kind is tuple or kind is torch.Size:
        key.append(_LIST)
        for v in value:
            _flatten(v, key, tensors, scalars)
        key.append(_END)
    elif isinstance(value, torch.Tensor):
        if value.dim() or value.device.type != "cpu":
            raise Foreign
        key.append((_FLOAT, value.dtype))
        scalars.append(value.item())
    elif isinstance(value, stand_ins.Native):
        key.append(_GENERATOR)
        scalars.append(stand_ins.handle(value))
    elif kind is complex:
        key.append((kind, value))
    else:
        key.append(value)
