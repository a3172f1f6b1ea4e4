"""Operators of a lease whose slices are on several servers: each goes to the worker that has its tensors.

The workers do not know each other. What one has and another needs goes through this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import composites, mixing, names, operators, stand_ins
from .dispatch import Dispatcher
from .tensor import RemoteTensor

aten = torch.ops.aten


class Crossing:
    """Called as a dispatcher is; ``of`` has each device's."""

    def __init__(self, of: Mapping[int, Dispatcher]) -> None:
        self._of = of

    def __call__(self, func: Any, args: tuple, kwargs: Any) -> Any:
        kwargs = kwargs or {}
        here = {t._geometry.index for t in _tensors((*args, *kwargs.values()))}
        device = kwargs.get("device")
        wanted = names.slice_index(device) if device is not None else None
        ways = {self._way(index) for index in here}
        if wanted is not None:
            ways.add(self._way(wanted))
        if not ways:
            ways = {self._way(names.current_index())}
        if len(ways) == 1:
            (way,) = ways
            _check_generators(way, (*args, *kwargs.values()))
            return way(func, args, kwargs)
        return self._across(func, args, kwargs, wanted)

    def _way(self, index: int) -> Dispatcher:
        try:
            return self._of[index]
        except KeyError:
            raise RuntimeError(
                "a tensor of a lease that has ended: its elements are lost; make it anew"
            ) from None

    def _across(self, func: Any, args: tuple, kwargs: dict, wanted: int | None) -> Any:
        if func is aten.copy_.default:
            return self._copy(args[0], args[1])
        one_place = len({t._geometry.index for t in _tensors(args)}) == 1
        if wanted is not None and one_place:
            if func is aten._to_copy.default:
                return self._to_copy(args[0], wanted, kwargs)
            if func in operators.ALLOCATES:
                return self._of[wanted](func, args, kwargs)
            if func in operators.LIKE:
                # They take of it its geometry alone: one that is there has the same.
                twin = self._empty(args[0]._geometry.on_meta(), wanted, args[0], kwargs["device"])
                return self._of[wanted](func, (twin, *args[1:]), kwargs)
        apart = composites.parts(func)
        if apart is not None:
            return apart(self, args, kwargs)
        mixing.refuse(func, args, kwargs)

    def _copy(self, destination: RemoteTensor, source: RemoteTensor) -> RemoteTensor:
        there = self._of[destination._geometry.index]
        host = torch.empty(source._geometry.size, dtype=source.dtype, device="cpu")
        operators.download(self._of[source._geometry.index], source, host)
        if source.dtype == destination.dtype:
            operators.upload(there, destination, host)
            return destination
        # Numbers are converted where CUDA would: on a GPU.
        twin = self._empty(host, destination._geometry.index, destination, destination.device)
        operators.upload(there, twin, host)
        return there(aten.copy_.default, (destination, twin), {})

    def _to_copy(self, source: RemoteTensor, index: int, kwargs: dict) -> RemoteTensor:
        wanted = {k: kwargs[k] for k in ("dtype", "memory_format") if kwargs.get(k) is not None}
        shape = aten._to_copy.default(source._geometry.on_meta(), **wanted)
        if shape.dtype.itemsize < source.dtype.itemsize:
            here = self._of[source._geometry.index]
            source = here(aten._to_copy.default, (source,), {"dtype": shape.dtype})
        return self._copy(self._empty(shape, index, source, kwargs["device"]), source)

    def _empty(self, shape: torch.Tensor, index: int, like: RemoteTensor, device: Any) -> RemoteTensor:
        """As a tensor of the same worker would be called: ``cuda`` where either says so."""
        cuda = like._geometry.cuda or names.says_cuda(device)
        place = torch.device("cuda" if cuda else names.BACKEND, index)
        return operators.empty(self._of[index], shape.shape, shape.stride(), shape.dtype, place)


def _tensors(values: Any) -> Iterator[RemoteTensor]:
    for value in values:
        if type(value) is RemoteTensor:
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check_generators(way: Dispatcher, values: tuple) -> None:
    for value in values:
        if isinstance(value, stand_ins.Native):
            owner = stand_ins.owner(value)
            if owner is not None and owner.held() is not way.stream:
                raise RuntimeError(
                    f"Expected a generator of the device that draws, but found one of '{owner.device}'"
                )
