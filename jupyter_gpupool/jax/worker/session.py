"""A JAX client's session: its arrays and programs on the slices of a lease."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jupyter_gpupool.jax.jax_internals import worker as internals
from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.jax.protocol.arrays import packed, unpacked
from jupyter_gpupool.jax.protocol.dtypes import DTYPES, nbytes_of, numpy_dtype
from jupyter_gpupool.jax.protocol.status import (
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    StatusError,
    status_of,
)
from jupyter_gpupool.transport.frames import WireError
from jupyter_gpupool.transport.specs import DeviceSpec

from . import calls
from .custom_calls import Array
from .programs import Program, compiled, rounded

#: How long a client that takes calls waits for the next one before it asks again, in seconds.
_TAKE_S = 10.0


class Slice(Protocol):
    """What a session needs of a slice, whose memory it shares with all other sessions of the lease."""

    spec: DeviceSpec
    limit: int
    allocated: int
    busy_s: float

    def take(self, nbytes: int) -> None:
        """Account for an allocation. Raises RuntimeError if it does not fit."""

    def give(self, nbytes: int) -> None:
        """Account for freed memory."""


class Elements:
    """An array's elements on the host, to be sent."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        flat = np.ascontiguousarray(array).reshape(-1)
        self.view = flat.view(np.uint8).data if flat.size else memoryview(b"")
        self.nbytes = self.view.nbytes

    def wait(self) -> memoryview:
        """All of them."""
        return self.view

    def pieces(self) -> Iterator[memoryview]:
        """All of them, in one piece."""
        yield self.view


class _Buffer:
    """An array, or why there is none. ``nbytes``: what it takes of its slice."""

    __slots__ = ("array", "failure", "nbytes", "device")

    def __init__(self, array: Any, device: int, nbytes: int = 0, failure: StatusError | None = None) -> None:
        self.array = array
        self.device = device
        self.nbytes = nbytes
        self.failure = failure


class _Program:
    """A program of this session's, and the client's numbers of its devices."""

    __slots__ = ("compiled", "devices")

    def __init__(self, compiled: Program, devices: Sequence[int]) -> None:
        self.compiled = compiled
        self.devices = devices


class JaxSession:
    """Executes one client's commands, see protocol/commands.py.

    ``slices``: by the numbers that the client has for them; ``positions``: the number of each within the lease, which
    has ``count`` of them. Raises ImportError where JAX cannot be used.
    """

    def __init__(
        self,
        slices: Mapping[int, Slice],
        positions: Mapping[int, int],
        count: int,
        answer: Callable[[Any, Elements | None], None],
    ) -> None:
        if not all(one.spec.emulated for one in slices.values()):
            raise ImportError("JAX runs on emulated GPUs only so far")
        self._slices = slices
        devices = internals.prepare(count)
        self._devices = {number: devices[position] for number, position in positions.items()}
        self._answer = answer
        self._buffers: dict[int, _Buffer] = {}
        self._programs: dict[int, _Program] = {}
        self._handlers: dict[int, Callable[..., Any]] = {
            commands.COMPILE: self._compile,
            commands.EXECUTE: self._execute,
            commands.READ: self._read,
            commands.READY: self._ready,
            commands.COPY: self._copy,
            commands.FREE: lambda: None,
            commands.MEMORY: self._memory,
            commands.SERVE: self._serve,
            commands.TAKE: self._take_call,
            commands.RAN: self._ran,
        }
        #: what waits for the end of each run of a program that calls functions, or why there was none
        self._runs: dict[int, Any] = {}
        #: where the calls of this session's programs wait, and where this session takes another one's
        self._own_desk: calls.CallDesk | None = None
        self._desk: calls.CallDesk | None = None

    def close(self) -> None:
        """Free everything."""
        self._free(list(self._buffers))
        self._programs.clear()
        for desk in (self._own_desk, self._desk):
            if desk is not None:
                calls.close_desk(desk)

    # -- frames

    def run(self, header: Any, finish: Callable[[], None]) -> None:
        """Execute a RECORDS frame, and call ``finish`` at its end. Raises WireError for what is no command."""
        began = time.perf_counter()
        try:
            code, freed, *fields = header
            handler = self._handlers[code]
            ok = len(fields) == commands.FIELDS[code]
        except (TypeError, ValueError, KeyError):
            ok = False
        if not ok:
            raise WireError("no command")
        try:
            self._free(freed)
            handler(*fields)
        except StatusError as e:
            self._answer([e.code, e.message], None)
        except (TypeError, ValueError, LookupError, AttributeError) as e:
            raise WireError(f"a command that makes no sense: {type(e).__name__}") from None
        if code != commands.TAKE:  # which only waits
            next(iter(self._slices.values())).busy_s += time.perf_counter() - began
        finish()

    def upload(
        self,
        id: Any,
        fields: Any,
        length: int,
        receive: Callable[[memoryview], None],
        finish: Callable[[], None],
    ) -> None:
        """Execute an UPLOAD frame of ``length`` bytes; ``receive`` fills a buffer with them."""
        if self._desk is not None:
            self._take_results(self._desk, id, fields, length, receive)
            finish()
            return
        try:
            freed, dtype, dims, number = fields
            itemsize = DTYPES[dtype][1]
            ok = nbytes_of(dtype, dims) == length and number in self._slices and type(id) is int
            ok = ok and all(type(n) is int and n >= 0 for n in dims)
        except (TypeError, ValueError, KeyError):
            ok = False
        if not ok:
            raise WireError("an upload that is no array")
        data = np.empty(length, np.uint8)
        if length:
            receive(data.data)
        self._free(freed)
        nbytes = rounded(length)
        try:
            self._take(number, nbytes)
            elements = (
                data.view(f"V{itemsize}" if itemsize > 1 else np.uint8).view(numpy_dtype(dtype)).reshape(dims)
            )
            self._keep(id, _Buffer(internals.put(elements, self._devices[number]), number, nbytes))
        except StatusError as e:
            self._keep(id, _Buffer(None, number, failure=e))
        finish()

    # -- commands

    def _compile(self, id: int, program: bytes, options: bytes, num_functions: int) -> None:
        numbers = internals.assigned_devices(options) or [[min(self._devices)]]
        several = [number for replica in numbers for number in replica]
        if len(set(several)) < len(several) or not self._devices.keys() >= set(several):
            raise StatusError(INVALID_ARGUMENT, f"there are no such devices as {several}")
        devices = [[self._devices[number] for number in replica] for replica in numbers]

        def call(function: int, operands: Sequence[Any], results: Sequence[Array]) -> tuple[Any, ...]:
            if self._own_desk is None:
                raise calls.CallFailed("the program does not let its functions be called")
            return self._own_desk.call(id, function, operands, results)

        found = compiled(program, options, devices, num_functions, call)
        self._programs[id] = _Program(found, several)
        self._answer([0, "", {**found.facts, "devices": numbers}], None)

    def _execute(self, id: int, inputs: Sequence[int], first: int, kept: Sequence[int]) -> None:
        program, devices = self._programs[id].compiled, self._programs[id].devices
        buffers = [self._buffers[k] for k in inputs]
        count = len(buffers) // len(devices)
        failure = next((b.failure for b in buffers if b.failure is not None), None)
        lost = [k for k in program.donated if k not in kept]
        lost = [place * count + k for place in range(len(devices)) for k in lost]
        taken: list[tuple[int, int]] = []
        made: list[list[Any]] = []
        run: Any = None
        if failure is None:
            try:
                for k in lost:
                    self._give(buffers[k])
                for device in devices:
                    self._take(device, sum(program.nbytes) + program.temporary)
                    taken.append((device, sum(program.nbytes) + program.temporary))
                arrays = [b.array for b in buffers]
                for k in kept:
                    if k in program.donated:
                        for at in range(k, len(arrays), count):
                            arrays[at] = internals.copy(arrays[at])
                if program.layout is not None:
                    arrays = [internals.joined(arrays[k::count], program.layout) for k in range(count)]
                made, run = internals.execute(program.executable, arrays, program.calls)
                taken = [(device, program.temporary) for device in devices]
            except StatusError as e:
                failure = e
            except (RuntimeError, ValueError) as e:  # XLA's own
                failure = _status(e)
            for device, nbytes in taken:
                self._slices[device].give(nbytes)
        for k in lost:
            self._free([inputs[k]])
        for place, device in enumerate(devices):
            for k, nbytes in enumerate(program.nbytes):
                output = first + place * len(program.nbytes) + k
                if failure is None:
                    self._keep(output, _Buffer(made[k][place], device, nbytes))
                else:
                    self._keep(output, _Buffer(None, device, failure=failure))
        if program.calls:
            self._runs[first + len(devices) * len(program.nbytes)] = failure or run

    def _usable(self, id: int) -> _Buffer:
        buffer = self._buffers.get(id)
        if buffer is None:
            raise StatusError(NOT_FOUND, f"there is no array {id}")
        if buffer.failure is not None:
            raise buffer.failure
        return buffer

    def _read(self, id: int) -> None:
        buffer = self._usable(id)
        try:
            elements = Elements(np.asarray(buffer.array))
        except (RuntimeError, ValueError) as e:  # XLA's own, of the program that computes it
            raise _status(e) from None
        self._answer([0, ""], elements)

    def _ready(self, id: int) -> None:
        buffer = self._usable(id)
        try:
            buffer.array.block_until_ready()
        except (RuntimeError, ValueError) as e:
            raise _status(e) from None
        self._answer([0, ""], None)

    def _ran(self, id: int) -> None:
        run = self._runs.pop(id)
        if isinstance(run, StatusError):
            raise run
        try:
            run.block_until_ready()
        except (RuntimeError, ValueError) as e:
            raise _status(e) from None
        self._answer([0, ""], None)

    def _copy(self, id: int, copy: int, number: int) -> None:
        try:
            source = self._usable(id)
            nbytes = rounded(source.array.nbytes)
            self._take(number, nbytes)
            array = (
                internals.copy(source.array)
                if number == source.device
                else internals.put(source.array, self._devices[number])
            )
            self._keep(copy, _Buffer(array, number, nbytes))
        except StatusError as e:
            self._keep(copy, _Buffer(None, number, failure=e))

    def _memory(self, number: int) -> None:
        one = self._slices[number]
        self._answer([0, "", one.allocated, one.limit], None)

    # -- the client's functions

    def _serve(self, bound_s: float) -> None:
        if self._own_desk is None:
            self._own_desk = calls.open_desk(float(bound_s))
        self._answer([0, "", self._own_desk.token], None)

    def _take_call(self, token: str, number: int, reason: str) -> None:
        if self._desk is None:
            self._desk = calls.find_desk(token)
        if number:
            self._desk.give(number, str(reason))
        call = self._desk.take(_TAKE_S)
        if call is None:
            self._answer([0, "", 0, 0, 0, []], None)
            return
        facts, data = packed(call.operands)
        elements = Elements(np.frombuffer(data, np.uint8)) if data else None
        self._answer([0, "", call.number, call.program, call.function, facts], elements)

    def _take_results(
        self,
        desk: calls.CallDesk,
        number: Any,
        facts: Any,
        length: int,
        receive: Callable[[memoryview], None],
    ) -> None:
        data = np.empty(length, np.uint8)
        if length:
            receive(data.data)
        try:
            desk.give(number, unpacked(facts, data))
        except (TypeError, ValueError, KeyError, AttributeError):
            raise WireError("results that are no arrays") from None

    # -- memory

    def _keep(self, id: int, buffer: _Buffer) -> None:
        if id in self._buffers:
            raise WireError("an id that is in use")
        self._buffers[id] = buffer

    def _take(self, number: int, nbytes: int) -> None:
        one = self._slices[number]
        try:
            one.take(nbytes)
        except RuntimeError:
            limit, allocated = one.limit, one.allocated
            raise StatusError(
                RESOURCE_EXHAUSTED,
                f"Out of memory while trying to allocate {nbytes} bytes on slice {number}, which has {limit} bytes, of "
                f"which {allocated} are in use. Free arrays, or request GPUs with more memory (-p or -m).",
            ) from None

    def _give(self, buffer: _Buffer) -> None:
        nbytes, buffer.nbytes = buffer.nbytes, 0
        if nbytes:
            self._slices[buffer.device].give(nbytes)

    def _free(self, ids: Sequence[int]) -> None:
        if not isinstance(ids, list) or not all(type(id) is int for id in ids):
            raise WireError("freed ids that are no numbers")
        for id in ids:
            buffer = self._buffers.pop(id, None)
            if buffer is None:
                self._programs.pop(id, None)
            else:
                self._give(buffer)


def _status(error: BaseException) -> StatusError:
    """XLA's own error."""
    return status_of(calls.failure_of(error))
