"""Handles every operator on a remote tensor: looks up its signature, sends the call, returns the result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream, ids
from jupyter_gpupool.pytorch.client.tensor.tensor import (
    RemoteTensor,
    Storage,
    TensorLayout,
    forget_geometries,
    geometry,
    make,
    make_view,
)
from jupyter_gpupool.pytorch.protocol.commands import DEFINE, RESET, RUN
from jupyter_gpupool.pytorch.torch_internals.client import NativeGenerator

from . import composites, generator_handles, mixed_devices
from . import prediction as signature
from .prediction import Definition, NewResult, Prediction, SameResult, ViewResult
from .schemas import SchemaDifferences
from .unfinished_calls import Called, unfinished

aten = torch.ops.aten

#: At more signatures than this, all are forgotten. Bounds the memory of programs whose shapes never repeat.
MAX_TEMPLATES = 20_000

#: Operators that are not one call in the worker: func → handler(dispatcher, args, kwargs).
SPECIAL: dict[Any, Callable[[Dispatcher, tuple[Any, ...], dict[str, Any]], Any]] = {}

#: What may handle a call with tensors that are no remote tensors: handler(func, args, kwargs) or NotImplemented.
FOREIGN: list[Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = []


def special(*funcs: Any) -> Callable[..., Any]:
    """Decorate the handler of operators that are not one call in the worker."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            SPECIAL[func] = handler
        return handler

    return register


class OutputPolicy(Protocol):
    """What to do with ``out=`` tensors that do not fit the result of their call."""

    def fit(self, d: Dispatcher, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Resize the ``out=`` tensors of a call, and return whether any had to be."""

    def fill(self, d: Dispatcher, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call without its ``out=`` tensors, copy into them and return them.

        NotImplemented if it cannot be run without them.
        """


class _Mark:
    """Part of a signature: marks an argument whose value does not belong to it, or separates values that
    Python calls equal (1, 1.0 and True)."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_FLOAT, _TRUE, _FALSE, _LIST, _END, _GENERATOR = map(_Mark, ("float", "True", "False", "[", "]", "generator"))


class Foreign(Exception):
    """An argument is a tensor of another device that is no plain number."""


class PredictedCall:
    """A call whose result was predicted: what to send, and what to return."""

    __slots__ = ("id", "geometry", "same", "view", "prediction")

    def __init__(self, id: int, prediction: Prediction) -> None:
        self.id = id
        self.prediction = prediction
        results = prediction.results
        #: the three commonest predictions, unpacked for the fast path; at most one is not None
        self.geometry: TensorLayout | None = results.geometry if isinstance(results, NewResult) else None
        self.same: int | None = results.tensor if isinstance(results, SameResult) else None
        self.view: TensorLayout | None = results.geometry if isinstance(results, ViewResult) else None


class Dispatcher:
    """Turns one process's calls of operators into commands of one stream."""

    def __init__(self, stream: CommandStream, outputs: OutputPolicy) -> None:
        self.stream = stream
        stream.unfinished = lambda kept: unfinished(kept, self._called)
        self._called: dict[int, Called] = {}
        self._outputs = outputs
        self._home = next(iter(stream.memory))
        self.templates: dict[tuple[Any, ...], PredictedCall] = {}
        self._defined = 0
        self._defining = threading.RLock()
        self.misses = 0
        #: where the worker's operators differ from this process's; None for the same release of PyTorch
        self.differences: SchemaDifferences | None = None

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` by its handler if it has one, else in the worker, and return its results."""
        special = SPECIAL.get(func)
        if special is not None:
            return special(self, args, kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` in the worker, without a handler of its own."""
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
                _flatten_named(kwargs, key, tensors, scalars)
        except Foreign:
            return self._run_with_foreign(func, args, kwargs)

        signature_key = tuple(key)
        template = self.templates.get(signature_key)
        if template is None:
            template = self._define(func, args, kwargs, signature_key, tensors)
            if template is None:
                return self._run_unpredicted(func, args, kwargs, tensors, scalars)

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

    def call_predicted(self, func: Any, args: tuple[Any, ...], layouts: Sequence[TensorLayout]) -> Any:
        """Call ``func``, whose results are new tensors of these layouts, and return a list of them."""
        key: list[Any] = [func, *layouts]
        tensors: list[RemoteTensor] = []
        scalars: list[Any] = []
        for value in args:
            _flatten(value, key, tensors, scalars)
        signature_key = tuple(key)
        template = self.templates.get(signature_key)
        if template is None:
            prediction = Prediction([NewResult(layout) for layout in layouts], tuple(layouts))
            with self._defining:
                template = self.templates.get(signature_key) or self._remember(
                    func, args, {}, signature_key, tensors, prediction
                )
        return self._general(template, tensors, scalars)

    def _run_with_foreign(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that has tensors of another device, or sparse ones, among its arguments."""
        for handle in FOREIGN:
            got = handle(func, args, kwargs)
            if got is not NotImplemented:
                return got
        apart = composites.parts(func)
        if apart is not None:
            SPECIAL[func] = apart
            return apart(self, args, kwargs)
        return self.run(func, *mixed_devices.bring(func, args, kwargs))

    def _run_unpredicted(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[RemoteTensor],
        scalars: list[Any],
    ) -> Any:
        """Run a call for which there is no prediction: a composite, one with ``out=`` tensors that do not
        fit, or one whose results are known only when it has run."""
        apart = composites.parts(func)
        if apart is not None:
            SPECIAL[func] = apart
            return apart(self, args, kwargs)
        apart = self.differences.parts(func) if self.differences is not None else None
        if apart is not None:
            return apart(self, args, kwargs)
        if func._schema.is_mutable:
            if self._outputs.fit(self, func, args, kwargs):
                return self.run(func, args, kwargs)
            filled = self._outputs.fill(self, func, args, kwargs)
            if filled is not NotImplemented:
                return filled
        return self._run_now(func, args, kwargs, tensors, scalars)

    def _general(self, template: PredictedCall, tensors: list[RemoteTensor], scalars: list[Any]) -> Any:
        prediction = template.prediction
        storages = [self.stream.new_storage(g.nbytes, g.index) for g in prediction.new]
        if not prediction.is_local:
            inputs = [t._storage.id for t in tensors]
            if storages:
                self.stream.sites.made(storages[0].id)
            self.stream.push((template.id, *inputs, *scalars, *[s.id for s in storages]))
        return _build(prediction.results, tensors, iter(storages))

    # -- the first call of a signature

    def _define(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: tuple[Any, ...],
        tensors: list[RemoteTensor],
    ) -> PredictedCall | None:
        """Predict a call and remember it; None for a composite, and if the results are known only when it has run."""
        if composites.parts(func) is not None:
            return None
        if self.differences is not None and self.differences.parts(func) is not None:
            return None
        mixed_devices.check(func, args, kwargs, tensors)
        try:
            prediction = signature.predict(func, args, kwargs, tensors)
        except signature.Unpredictable:
            return None
        with self._defining:  # another thread may call the same signature at this moment
            return self.templates.get(key) or self._remember(func, args, kwargs, key, tensors, prediction)

    def _remember(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: tuple[Any, ...],
        tensors: list[RemoteTensor],
        prediction: Prediction,
    ) -> PredictedCall:
        self.misses += 1
        if len(self.templates) >= MAX_TEMPLATES:
            self.templates.clear()
            self._called.clear()
            forget_geometries()
            self.stream.push((RESET,))
        template = PredictedCall(self._defined, prediction)
        if not prediction.is_local:
            index = tensors[0]._geometry.index if tensors else self._home
            definition = self._definition(func, args, kwargs, index, prediction.results)
            self._defined += 1
            counts = definition["tensors"], definition["scalars"], len(prediction.new)
            self._called[template.id] = Called(definition["op"], *counts)
            self.stream.push((DEFINE, template.id, definition))
        self.templates[key] = template
        return template

    def _definition(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, results: Any
    ) -> dict[str, Any]:
        definition = Definition(func, args, kwargs, index)
        wire = definition.wire(results)
        if self.differences is not None:
            name, positional, named = self.differences.translate(func, definition.args, definition.kwargs)
            wire.update(op=name, args=positional, kwargs=named)
        return wire

    def _run_now(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[RemoteTensor],
        scalars: list[Any],
    ) -> Any:
        """Run ``func`` and wait for its results: they depend on values, or the call is about to fail."""
        index = tensors[0]._geometry.index if tensors else self._home
        cuda = any(t._geometry.cuda for t in tensors)
        definition = self._definition(func, args, kwargs, index, None)
        answer = self.stream.ask((RUN, definition, [t._storage.id for t in tensors], scalars, next(ids)))
        return self._receive(answer["results"], tensors, cuda)

    def _receive(self, result: Any, tensors: list[RemoteTensor], cuda: bool) -> Any:
        """The results that the worker describes, see WorkerSession._run_now in executor.py."""
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
    """The results of a call, as they were predicted."""
    if isinstance(result, NewResult):
        return make(next(storages), result.geometry)
    if isinstance(result, SameResult):
        return tensors[result.tensor]
    if isinstance(result, ViewResult):
        return make_view(tensors[result.tensor], result.geometry)
    if result is None:
        return None
    return type(result)([_build(r, tensors, storages) for r in result])


def _flatten_named(kwargs: dict[str, Any], key: list[Any], tensors: list[Any], scalars: list[Any]) -> None:
    for name, value in kwargs.items():
        key.append(name)
        _flatten(value, key, tensors, scalars)


def _flatten(value: Any, key: list[Any], tensors: list[Any], scalars: list[Any]) -> None:
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
    elif isinstance(value, NativeGenerator):
        key.append(_GENERATOR)
        scalars.append(generator_handles.handle(value))
    elif kind is complex:
        key.append((kind, value))
    else:
        key.append(value)
