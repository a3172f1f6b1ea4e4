"""Operators of a lease with slices on several servers: each goes to the worker that has its tensors.

Copies between workers go from worker to worker, or, where these are not linked, through this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import NativeGenerator

from . import composites, copies, direct_copies, generator_handles, mixed_devices
from .dispatcher import Dispatcher

aten = torch.ops.aten


class MultiWorkerDispatcher:
    """Called as a :class:`Dispatcher` is; ``of`` maps each slice's number to the dispatcher of its worker."""

    def __init__(self, of: Mapping[int, Dispatcher]) -> None:
        self._of = of

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call ``func`` in the worker that has its tensors; copy or refuse if several workers have some."""
        kwargs = kwargs or {}
        here = {t._geometry.index for t in _tensors((*args, *kwargs.values()))}
        device = kwargs.get("device")
        wanted = device_names.slice_index(device) if device is not None else None
        ways = {self._way(index) for index in here}
        if wanted is not None:
            ways.add(self._way(wanted))
        if not ways:
            ways = {self._way(device_names.current_index())}
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
                "this tensor belongs to a lease that has ended, so its elements are lost; create it again"
            ) from None

    def _across(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: int | None) -> Any:
        if func is aten.copy_.default:
            return self._copy(args[0], args[1])
        one_place = len({t._geometry.index for t in _tensors(args)}) == 1
        if wanted is not None and one_place:
            if func is aten._to_copy.default:
                return self._to_copy(args[0], wanted, kwargs)
            if func in copies.ALLOCATES:
                return self._of[wanted](func, args, kwargs)
            if func in copies.LIKE:
                # They use only the layout of their tensor: one on the other worker has the same.
                twin = self._empty(args[0]._geometry.on_meta(), wanted, args[0], kwargs["device"])
                return self._of[wanted](func, (twin, *args[1:]), kwargs)
        apart = composites.parts(func)
        if apart is not None:
            return apart(self, args, kwargs)
        return mixed_devices.refuse(func, args, kwargs)

    def _copy(self, destination: RemoteTensor, source: RemoteTensor) -> RemoteTensor:
        there = self._of[destination._geometry.index]
        if self._directly(destination, source):
            return destination
        host = torch.empty(source._geometry.size, dtype=source.dtype, device="cpu")
        copies.download(self._of[source._geometry.index], source, host)
        if source.dtype == destination.dtype:
            copies.upload(there, destination, host)
            return destination
        # CUDA converts numbers on a GPU.
        twin = self._empty(host, destination._geometry.index, destination, destination.device)
        copies.upload(there, twin, host)
        return there(aten.copy_.default, (destination, twin), {})

    def _directly(self, destination: RemoteTensor, source: RemoteTensor) -> bool:
        here, there = (self._of[t._geometry.index] for t in (source, destination))
        fits = destination.dtype == source.dtype and destination.shape == source.shape
        if not direct_copies.are_linked(here.stream, there.stream):
            return False
        arrives = destination
        if not fits:
            shape = torch.empty(source._geometry.size, dtype=source.dtype, device="meta")
            arrives = self._empty(shape, destination._geometry.index, destination, destination.device)
        if not direct_copies.copy(source, here.stream, arrives, there.stream):
            return False
        if not fits:
            there(aten.copy_.default, (destination, arrives), {})
        return True

    def _to_copy(self, source: RemoteTensor, index: int, kwargs: dict[str, Any]) -> RemoteTensor:
        wanted = {k: kwargs[k] for k in ("dtype", "memory_format") if kwargs.get(k) is not None}
        shape = aten._to_copy.default(source._geometry.on_meta(), **wanted)
        if shape.dtype.itemsize < source.dtype.itemsize:
            here = self._of[source._geometry.index]
            source = here(aten._to_copy.default, (source,), {"dtype": shape.dtype})
        return self._copy(self._empty(shape, index, source, kwargs["device"]), source)

    def _empty(self, shape: torch.Tensor, index: int, like: RemoteTensor, device: Any) -> RemoteTensor:
        """A new tensor, named ``cuda`` if ``like`` or ``device`` is."""
        cuda = like._geometry.cuda or device_names.says_cuda(device)
        place = torch.device("cuda" if cuda else device_names.BACKEND, index)
        return copies.empty(self._of[index], shape.shape, shape.stride(), shape.dtype, place)


def _tensors(values: Any) -> Iterator[RemoteTensor]:
    for value in values:
        if type(value) is RemoteTensor:
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check_generators(way: Dispatcher, values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, NativeGenerator):
            owner = generator_handles.owner(value)
            if owner is not None and owner.held() is not way.stream:
                raise RuntimeError(
                    f"Expected a generator of the device that draws, but found one of '{owner.device}'"
                )
