"""``torch.Generator`` on a slice: random state that lives in the worker."""

from __future__ import annotations

import secrets
from typing import Any

import torch

from . import connection, names
from .memory import host_bytes
from .names import BACKEND
from .records import FREE, GENERATOR, GET_RNG, SEED_BITS, SET_RNG
from .slices import DEFAULT_SEED
from .stand_ins import Native, register
from .stream import ids


class Generator:
    """Random state on a slice, with the methods of :class:`torch.Generator`.

    PyTorch's functions take no generator but their own kind. They do hand every argument that has
    ``__torch_function__`` to it, which puts in this one's place a stand-in that the dispatcher knows.
    """

    def __init__(self, index: int, cuda: bool = True, handle: int | None = None) -> None:
        self.device = torch.device("cuda" if cuda else BACKEND, index)
        self._index = index
        self._stand_in = Native("cpu")
        register(self._stand_in, self)
        self._stream: Any = None
        if handle is None:
            self._stream = connection.stream(index)
            self.handle = next(ids)
            self.manual_seed(DEFAULT_SEED)
        else:
            self.handle = handle

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.buffer.extend((FREE, self.handle))

    def held(self) -> Any:
        """The stream of the lease that holds this generator. Raises RuntimeError when that is over."""
        stream = connection.stream(self._index)
        if self._stream not in (None, stream):
            raise RuntimeError("this generator is of a lease that has ended; make a new one")
        return stream

    def manual_seed(self, seed: int) -> Generator:
        self.held().push((GENERATOR, self.handle, self._index, int(seed) & SEED_BITS))
        return self

    def seed(self) -> int:
        """Seed with a number that nobody can foresee, and return it."""
        seed = secrets.randbits(53)
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        return int(self.held().ask((GET_RNG, self.handle))["seed"])

    def get_state(self) -> torch.Tensor:
        """The state as a tensor of bytes on the CPU."""
        answer = self.held().ask((GET_RNG, self.handle))
        return torch.frombuffer(bytearray(answer["state"]), dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> Generator:
        if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        self.held().push((SET_RNG, self.handle, bytes(host_bytes(state.cpu().contiguous()))))
        return self

    def clone_state(self) -> Generator:
        return Generator(self._index, self.device.type == "cuda").set_state(self.get_state())

    def __reduce__(self) -> tuple:
        return _restored, (str(self.device), self.get_state())

    def __repr__(self) -> str:
        return f"<torch.Generator device='{self.device}'>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = _place(args, kwargs)
        if names.slice_index(place) is None:
            generator = next(v for v in (*args, *kwargs.values()) if isinstance(v, Generator))
            raise RuntimeError(
                f"Expected a '{place.type}' device type for generator but found '{generator.device.type}'"
            )
        return func(*map(_stood_in, args), **{k: _stood_in(v) for k, v in kwargs.items()})


def default(index: int) -> Generator:
    """The generator that a slice uses when a program names none."""
    return Generator(index, handle=-1 - index)


def _restored(device: str, state: torch.Tensor) -> Any:
    return torch.Generator(device).set_state(state)


def _stood_in(value: Any) -> Any:
    return value._stand_in if isinstance(value, Generator) else value


def _place(args: tuple, kwargs: dict) -> torch.device:
    """Where a call that was given a generator will draw."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.get_default_device()


class _Kind(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (Native, Generator))

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, (Native, Generator))


class Facade(metaclass=_Kind):
    """Stands in for :class:`torch.Generator`: one of a slice where a slice is named, else PyTorch's own."""

    def __new__(cls, device: Any = "cpu") -> Any:
        index = names.slice_index(device)
        if index is None:
            return Native(device)
        return Generator(index, torch.device(device).type == "cuda")


Facade.__name__ = Facade.__qualname__ = "Generator"
Facade.__module__ = "torch"
