"""Buffers: arrays on the slices, sent there, read back and copied."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.jax.protocol.dtypes import DTYPES, NAMES
from jupyter_gpupool.jax.protocol.status import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    UNIMPLEMENTED,
    StatusError,
)

from .devices import Devices
from .functions import Functions
from .layouts import STRUCTURES
from .native import Handle, Native
from .programs import id_of
from .session import SliceSession

#: The kinds of layouts: an order of dimensions, or a step in bytes for each.
_TILED, _STRIDES = 0, 1


class Buffers:
    """Answers what XLA asks of buffers, beside what handles.c answers."""

    def __init__(self, devices: Devices, native: Native, functions: Functions) -> None:
        self._devices = devices
        self._functions = functions
        self._native = native

    @property
    def _session(self) -> SliceSession:
        assert self._devices.session is not None, "buffers are made after the client was made"
        return self._devices.session

    def _usable(self, handle: int) -> Handle:
        found = Handle.from_address(handle)
        if found.is_deleted:
            raise StatusError(FAILED_PRECONDITION, "the array has been deleted or donated")
        return found

    def from_host(self, a: Any) -> None:
        """Send an array's elements. Once this returns, the program may change them."""
        dtype = NAMES.get(a.type)
        if dtype is None:
            raise StatusError(
                UNIMPLEMENTED, f"arrays of PJRT's type {a.type} are not supported on a slice yet"
            )
        _check_layout(a.layout, None)
        dims = tuple((ctypes.c_int64 * a.num_dims).from_address(a.dims)) if a.num_dims else ()
        strides = (
            tuple((ctypes.c_int64 * a.num_byte_strides).from_address(a.byte_strides))
            if a.num_byte_strides
            else None
        )
        data = _elements(a.data, DTYPES[dtype], dims, strides)
        number = self._devices.index(a.device or a.memory)
        id = self._session.new_ids()
        self._session.upload(id, dtype, dims, number, data)
        a.buffer = self._native.buffer(
            id,
            a.type,
            a.dims,
            a.num_dims,
            data.nbytes,
            self._devices.device[number],
            self._devices.memory[number],
        )
        a.done_with_host_buffer = self._native.event(True)

    def to_host(self, a: Any) -> None:
        """Read an array's elements, into memory that XLA keeps until the event is ready."""
        handle = self._usable(a.buffer)
        _check_layout(a.layout, handle, DTYPES[NAMES[handle.element_type]][1])
        if not a.destination:
            a.size = handle.nbytes
            return
        if a.size < handle.nbytes:
            raise StatusError(INVALID_ARGUMENT, f"{handle.nbytes} bytes do not fit into {a.size}")
        self._functions.refuse_inside()
        into = None
        if handle.nbytes:
            into = memoryview((ctypes.c_char * handle.nbytes).from_address(a.destination)).cast("B")
        a.event = self._event_of(commands.READ, handle.id, into)

    def ready_event(self, a: Any) -> None:
        """An event for the moment in which the array is there."""
        self._functions.refuse_inside()
        a.event = self._event_of(commands.READY, self._usable(a.buffer).id)

    def _event_of(self, code: int, id: int, into: memoryview | None = None) -> int:
        native = self._native
        event: int = native.event(False)

        def done(answer: Any, error: StatusError | None) -> None:
            text = error.message.encode() if error else b""
            native.set(event, error.code if error else 0, text, len(text))

        try:
            self._session.ask(done, code, id, into=into)
        except StatusError as e:
            done(None, e)
        return event

    def delete(self, a: Any) -> None:
        """Free a buffer before XLA destroys it."""
        if self._native.delete(a.buffer):
            self._session.free([id_of(a.buffer)])

    def copy(self, a: Any) -> None:
        """Copy a buffer to a device, or to its memory."""
        handle = self._usable(a.buffer)
        number = self._devices.index(a.target)
        id = self._session.new_ids()
        self._session.tell(commands.COPY, handle.id, id, number)
        device, memory = self._devices.device[number], self._devices.memory[number]
        a.copy = self._native.buffer(
            id, handle.element_type, handle.dims, handle.rank, handle.nbytes, device, memory
        )

    #: What fills which place of the table, with its structure.
    PLACES = {
        "Client_BufferFromHostBuffer": (from_host, "Client_BufferFromHostBuffer"),
        "Buffer_ToHostBuffer": (to_host, "Buffer_ToHostBuffer"),
        "Buffer_ReadyEvent": (ready_event, "Buffer_ReadyEvent"),
        "Buffer_Delete": (delete, "Buffer"),
        "Buffer_CopyToDevice": (copy, "Buffer_Copy"),
        "Buffer_CopyToMemory": (copy, "Buffer_Copy"),
    }


def _check_layout(address: int | None, handle: Handle | None, itemsize: int = 0) -> None:
    """Raise StatusError unless the layout is row-major, for the elements of ``handle`` where those are known."""
    if not address:
        return
    layout: Any = STRUCTURES["MemoryLayout"].from_address(address)
    count = layout.minor_to_major_size
    numbers = list((ctypes.c_int64 * count).from_address(layout.minor_to_major)) if count else []
    if layout.type == _TILED and not layout.num_tiles and numbers == list(range(count))[::-1]:
        return
    if layout.type == _STRIDES and handle is not None:
        dims = list((ctypes.c_int64 * handle.rank).from_address(handle.dims)) if handle.rank else []
        if numbers == [math.prod(dims[k + 1 :]) * itemsize for k in range(handle.rank)]:
            return
    raise StatusError(
        UNIMPLEMENTED, "an array that is not in row-major order is not supported on a slice yet"
    )


def _elements(
    address: int, dtype: tuple[int, int], dims: tuple[int, ...], strides: tuple[int, ...] | None
) -> memoryview:
    """Return the bytes of an array in row-major order: its own if they are, or a copy."""
    import numpy as np

    itemsize = dtype[1]

    class Foreign:
        __array_interface__ = {
            "data": (address, True),
            "shape": dims,
            "strides": strides,
            "typestr": f"|V{itemsize}",
            "version": 3,
        }

    if 0 in dims:
        return memoryview(b"")
    elements = np.ascontiguousarray(Foreign())
    return elements.reshape(-1).view(np.uint8).data
