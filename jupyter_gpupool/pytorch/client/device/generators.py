"""``torch.Generator`` on a slice. Its random state is in the worker."""

from __future__ import annotations

import copyreg
import pkgutil
import secrets
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.dispatch.generator_handles import register
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.command_stream import ids
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.protocol.commands import (
    DEFAULT_SEED,
    FREE,
    GENERATOR,
    GET_RNG,
    SEED_BITS,
    SET_RNG,
)
from jupyter_gpupool.pytorch.protocol.sizes import host_bytes
from jupyter_gpupool.pytorch.torch_internals.client import NativeGenerator


class Generator:
    """Random state on a slice, with the methods of :class:`torch.Generator`.

    PyTorch's functions accept only PyTorch's own generators, but call an argument's ``__torch_function__``
    first. That replaces this generator by one of PyTorch's own, which the dispatcher maps back.
    """

    def __init__(self, index: int, cuda: bool = True, handle: int | None = None) -> None:
        self.device = torch.device("cuda" if cuda else BACKEND, index)
        self._index = index
        self._stand_in = NativeGenerator("cpu")
        register(self._stand_in, self)
        self._stream: Any = None
        if handle is None:
            self._stream = attachment.stream(index)
            self.handle = next(ids)
            self.manual_seed(DEFAULT_SEED)
        else:
            self.handle = handle

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.buffer.extend((FREE, self.handle))

    def held(self) -> Any:
        """The stream to the worker that has this generator. Raises RuntimeError if its lease has ended."""
        stream = attachment.stream(self._index)
        if self._stream not in (None, stream):
            raise RuntimeError("this generator belongs to a lease that has ended; create a new one")
        return stream

    def manual_seed(self, seed: int) -> Generator:
        """Seed the generator, and return it."""
        self.held().push((GENERATOR, self.handle, self._index, int(seed) & SEED_BITS))
        return self

    def seed(self) -> int:
        """Seed with a random number, and return the number."""
        seed = secrets.randbits(53)
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        """The number that the generator was last seeded with."""
        return int(self.held().ask((GET_RNG, self.handle))["seed"])

    def get_state(self) -> torch.Tensor:
        """The state, a one-dimensional uint8 tensor on the CPU."""
        answer = self.held().ask((GET_RNG, self.handle))
        return torch.frombuffer(bytearray(answer["state"]), dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> Generator:
        """Set the state to what :meth:`get_state` returned. Raises TypeError for no uint8 tensor."""
        if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        self.held().push((SET_RNG, self.handle, bytes(host_bytes(state.cpu().contiguous()))))
        return self

    def clone_state(self) -> Generator:
        """A new generator on the same slice with the same state."""
        return Generator(self._index, self.device.type == "cuda").set_state(self.get_state())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (str(self.device), self.get_state())

    def __repr__(self) -> str:
        return f"<torch.Generator device='{self.device}'>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = _place(args, kwargs)
        if device_names.slice_index(place) is None:
            generator = next(v for v in (*args, *kwargs.values()) if isinstance(v, Generator))
            raise RuntimeError(
                f"Expected a '{place.type}' device type for generator but found '{generator.device.type}'"
            )
        return func(*map(_stood_in, args), **{k: _stood_in(v) for k, v in kwargs.items()})


def default(index: int) -> Generator:
    """The generator that a slice uses for calls without a generator."""
    return Generator(index, handle=-1 - index)


def _restored(device: str, state: torch.Tensor) -> Any:
    return torch.Generator(device).set_state(state)


def _stood_in(value: Any) -> Any:
    return value._stand_in if isinstance(value, Generator) else value


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device on which a call with a generator draws."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.get_default_device()


class _GeneratorMeta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (NativeGenerator, Generator))

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, (NativeGenerator, Generator))


class GeneratorType(metaclass=_GeneratorMeta):
    """Replaces :class:`torch.Generator`: creates a slice's generator if a slice is named, else PyTorch's own."""

    def __new__(cls, device: Any = "cpu") -> Any:
        """A generator on the device, which may be a slice or the CPU."""
        index = device_names.slice_index(device)
        if index is None:
            return NativeGenerator(device)
        return Generator(index, torch.device(device).type == "cuda")


GeneratorType.__name__ = GeneratorType.__qualname__ = "Generator"
# PyTorch's own is pickled by its name in torch._C, where it stays.
copyreg.pickle(_GeneratorMeta, lambda cls: (pkgutil.resolve_name, ("torch:Generator",)))
