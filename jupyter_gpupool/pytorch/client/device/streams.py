"""Streams and events of a slice, as ``torch.cuda`` and ``torch`` name them.

A worker executes the commands of a session in order, whatever stream they were issued on. So a stream
never has to wait for another. What remains is to keep the current stream, to wait in the client, and to
measure time.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.command_stream import ids
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.protocol.commands import AWAIT, DONE, ELAPSED, EVENT, FREE
from jupyter_gpupool.pytorch.torch_internals.client import DeviceType

_TYPE = DeviceType.PrivateUse1

_numbers = itertools.count(1)

_NOT_SHARED = (
    "events of a leased GPU cannot be shared between processes; synchronize, and notify the other process"
)


class Stream(torch.Stream):
    """A stream of a slice. Number 0 is the default stream."""

    #: whether a program sees its device as ``cuda``
    _cuda = False

    def __new__(
        cls,
        device: Any = None,
        priority: int = 0,
        *,
        stream_id: int | None = None,
        device_index: int | None = None,
        device_type: Any = None,
    ) -> Any:
        if device is not None:
            device_index = device_names.slice_index(device)
            if device_index is None:
                raise RuntimeError(f"Invalid device, must be a cuda or {BACKEND} device: {device}")
        elif device_index is None:
            device_index = device_names.current_index()
        number = next(_numbers) if stream_id is None else stream_id
        made = super().__new__(cls, stream_id=number, device_index=device_index, device_type=_TYPE.value)
        made.priority = max(-5, min(0, priority))  # type: ignore[attr-defined]
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._before: list[Any] = []

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda" if self._cuda else BACKEND, self.device_index)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def query(self) -> bool:
        return attachment.stream(self.device_index).ask((DONE, -1 - self.device_index))

    def synchronize(self) -> None:
        attachment.stream(self.device_index).wait(self.device_index)

    def record_event(self, event: Any = None) -> Any:
        event = (CudaEvent() if self._cuda else Event()) if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        event.wait(self)

    def wait_stream(self, stream: Any) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"expected a Stream, got {type(stream).__name__}")

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> Stream:
        context = StreamContext(self)
        context.__enter__()
        self._before.append(context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._before.pop().__exit__(*error)

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, Stream)
            and other.stream_id == self.stream_id
            and other.device_index == self.device_index
        )

    def __hash__(self) -> int:
        return hash((self.stream_id, self.device_index))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} cuda_stream={self.stream_id:#x}>"


class CudaStream(Stream):
    """:class:`torch.cuda.Stream`."""

    _cuda = True


class Event(torch.Event):
    """A moment in the work of a slice."""

    _cuda = False
    _connection: Any = None

    def __new__(cls, device: Any = None, **options: Any) -> Any:
        return super().__new__(cls, BACKEND)

    def __init__(
        self,
        device: Any = None,
        *,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        if interprocess:
            raise RuntimeError(_NOT_SHARED)
        self._timing = bool(enable_timing)
        self._id = next(ids)
        self._index: int | None = None

    def __del__(self) -> None:
        if self._connection is not None:
            self._connection.buffer.extend((FREE, self._id))

    def _ask(self, record: tuple[Any, ...]) -> Any:
        if self._index is None or attachment.stream(self._index) is not self._connection:
            raise RuntimeError("this event belongs to a lease that has ended; create a new one")
        return self._connection.ask(record)

    @property
    def device(self) -> torch.device | None:  # type: ignore[override]
        if self._index is None:
            return None
        return torch.device("cuda" if self._cuda else BACKEND, self._index)

    @property
    def event_id(self) -> int:  # type: ignore[override]
        return self._id if self._index is not None else 0

    cuda_event = event_id

    def record(self, stream: Any = None) -> None:
        index = (stream or current_stream(cuda=self._cuda)).device_index
        if self._index not in (None, index):
            raise RuntimeError(
                f"Event device {self.device} does not match recording stream's device index {index}"
            )
        self._connection = attachment.stream(index)
        self._connection.push((EVENT, self._id, index))
        self._index = index

    def wait(self, stream: Any = None) -> None:
        """Does nothing: later work of ``stream`` runs after this event anyway."""

    def query(self) -> bool:
        return self._index is None or self._ask((DONE, self._id))

    def synchronize(self) -> None:
        if self._index is not None:
            self._ask((AWAIT, self._id))

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to ``end_event``, measured by the worker."""
        if not (self._timing and end_event._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._index is None or end_event._index is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if end_event._connection is not self._connection:
            raise RuntimeError(
                "cannot measure the time between events of GPUs on different servers, because their clocks differ; "
                "record both events on one GPU"
            )
        return self._ask((ELAPSED, self._id, end_event._id))

    def ipc_handle(self) -> bytes:
        raise RuntimeError(_NOT_SHARED)

    def __repr__(self) -> str:
        return (
            f"<torch.cuda.Event {self._id:#x}>"
            if self._index is not None
            else "<torch.cuda.Event uninitialized>"
        )


class CudaEvent(Event):
    """:class:`torch.cuda.Event`, whose arguments may be given by position."""

    _cuda = True

    def __new__(cls, *options: Any, **named: Any) -> Any:
        return super().__new__(cls)

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        super().__init__(enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)


# -- the current stream of each slice, for each thread


class _Current(threading.local):
    def __init__(self) -> None:
        self.numbers: dict[int, tuple[int, int]] = {}


_current = _Current()


def _index(device: Any) -> int:
    index = device_names.slice_index(device) if device is not None else None
    return device_names.current_index() if index is None else index


def current_stream(device: Any = None, cuda: bool = False) -> Stream:
    """The calling thread's current stream of a slice; of the current one without ``device``."""
    index = _index(device)
    number, priority = _current.numbers.get(index, (0, 0))
    return (CudaStream if cuda else Stream)(stream_id=number, device_index=index, priority=priority)


def default_stream(device: Any = None, cuda: bool = False) -> Stream:
    """The default stream of a slice; of the current one without ``device``."""
    return (CudaStream if cuda else Stream)(stream_id=0, device_index=_index(device))


def set_stream(stream: Any) -> None:
    """Make ``stream`` its slice's current stream, and that slice the current device."""
    if stream is None:
        return
    device_names.set_current_index(stream.device_index)
    _current.numbers[stream.device_index] = stream.stream_id, getattr(stream, "priority", 0)


class StreamContext:
    """``with torch.cuda.stream(s):``. Does nothing if ``s`` is None."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is None:
            return
        self._device = device_names.current_index()
        self._number = _current.numbers.get(self.stream.device_index)
        set_stream(self.stream)

    def __exit__(self, *error: Any) -> None:
        if self.stream is None:
            return
        if self._number is None:
            _current.numbers.pop(self.stream.device_index, None)
        else:
            _current.numbers[self.stream.device_index] = self._number
        device_names.set_current_index(self._device)


def facade(native: type, ours: type, cudas: type) -> type:
    """A class to replace ``torch.Stream`` or ``torch.Event``.

    It creates ``cudas`` or ``ours``, by the name of the slice, and ``native`` for another device.
    """

    class NativeMeta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, native)

        def __subclasscheck__(cls, subclass: Any) -> bool:
            return issubclass(subclass, native)

    class Facade(metaclass=NativeMeta):
        def __new__(cls, device: Any = None, **options: Any) -> Any:
            if options.get("device_type") not in (None, _TYPE.value):
                return native(**options)
            if device is not None and device_names.slice_index(device) is None:
                return native(device, **options)
            unnamed = device is None or isinstance(device, int)  # the current accelerator
            cuda = device_names.cuda_is_ours and (unnamed or torch.device(device).type == "cuda")
            if cuda and ours is Event:
                return cudas(**options)
            return (cudas if cuda else ours)(device, **options)

    Facade.__name__ = Facade.__qualname__ = native.__name__
    Facade.__module__ = "torch"
    return Facade
