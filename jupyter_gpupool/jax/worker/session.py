"""A JAX client's session: its arrays and programs on the slices of a lease."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jupyter_gpupool.jax.jax_internals import worker as internals
from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.jax.protocol.arrays import packed, unpacked
from jupyter_gpupool.jax.protocol.dtypes import DTYPES, nbytes_of
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
from .buffers import Buffer, aligned, array_of
from .custom_calls import Array
from .programs import Program, compiled, rounded
from .running import Running

#: Commands that need nothing of a slice's memory.
_NEEDLESS = (commands.FREE, commands.MEMORY, commands.SERVE)
#: How long a client that takes calls waits for the next one before it asks again, in seconds.
_TAKE_S = 10.0
#: The most bytes of programs that move: the state of a lease has to fit into 1 GiB, apart from arrays' elements.
_MAX_MOVED_BYTES = 1 << 30


class Slice(Protocol):
    """What a session needs of a slice, whose memory it shares with all other sessions of the lease."""

    spec: DeviceSpec
    limit: int
    busy_s: float

    def taken(self) -> int:
        """The bytes that are accounted for, of all sessions together."""

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


class _Program:
    """A program of this session's, and the client's numbers of the devices of each of its replicas.

    It is compiled when it is first used, where it comes from the worker before. ``given``: what is compiled, and its
    options; ``donated`` and ``nbytes``: as those of :class:`.programs.Program`, which are told to the client.
    ``calls``: whether it calls functions of the client; such a program does not come from the worker before.
    """

    __slots__ = ("_compile", "_compiled", "calls", "devices", "donated", "given", "nbytes", "replicas")

    def __init__(
        self,
        given: tuple[bytes, bytes],
        replicas: Sequence[Sequence[int]],
        donated: Sequence[int],
        nbytes: Sequence[int],
        compile: Callable[[], Program],
    ) -> None:
        self.given = given
        self.replicas = replicas
        self.devices = [number for replica in replicas for number in replica]
        self.donated = donated
        self.nbytes = nbytes
        self.calls = False
        self._compile = compile
        self._compiled: Program | None = None

    def compiled(self) -> Program:
        """Return it compiled. Raises StatusError."""
        if self._compiled is None:
            self._compiled = self._compile()
        return self._compiled


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
        self._buffers: dict[int, Buffer] = {}
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
        self._running = Running()
        #: what waits for the end of each run of a program that calls functions, or why there was none
        self._runs: dict[int, Any] = {}
        #: where the calls of this session's programs wait, and where this session takes another one's
        self._own_desk: calls.CallDesk | None = None
        self._desk: calls.CallDesk | None = None

    def close(self) -> None:
        """Free everything."""
        self._free(list(self._buffers))
        self._programs.clear()
        self._running.close()
        for desk in (self._own_desk, self._desk):
            if desk is not None:
                calls.close_desk(desk)

    # -- parking and moving

    def is_apart(self, header: Any = None) -> bool:
        """Whether a frame, of that header if it is a RECORDS frame, only takes calls, and may wait for long."""
        return self._desk is not None or (
            isinstance(header, list) and len(header) > 0 and header[0] == commands.TAKE
        )

    def needs_memory(self, header: Any) -> bool:
        """Whether a RECORDS frame may use a slice's memory."""
        return not (isinstance(header, list) and len(header) > 0 and header[0] in _NEEDLESS)

    def objection(self) -> str:
        """Return why the lease cannot move now, empty if it can."""
        programs = self._programs.values()
        if self._runs or self._desk is not None or any(one.calls for one in programs):
            return (
                "a JAX program of a process calls functions of that process, and does not move with its lease"
            )
        nbytes = sum(len(part) for one in programs for part in one.given)
        if nbytes >= _MAX_MOVED_BYTES:
            return f"a process has JAX programs of {nbytes >> 20} MiB, of which {_MAX_MOVED_BYTES >> 20} MiB could move"
        return ""

    def buffers(self) -> dict[int, Buffer]:
        """Return all arrays by their ids."""
        return dict(self._buffers)

    def describe(self) -> Any:
        """Describe the session at rest, apart from its arrays' elements, in plain values."""
        arrays = [
            [
                id,
                b.device,
                *(b.form or ("", ())),
                b.failure and [b.failure.code, b.failure.message, b.failure.origin],
            ]
            for id, b in self._buffers.items()
        ]
        programs = [
            [id, *one.given, [list(replica) for replica in one.replicas], list(one.donated), list(one.nbytes)]
            for id, one in self._programs.items()
        ]
        return [internals.version(), arrays, programs]

    def restore(self, described: Any, contents: Mapping[int, np.ndarray[Any, Any]]) -> None:
        """Be what :meth:`describe` described. ``contents``: the bytes of arrays, by id.

        Raises ValueError, and RuntimeError where a slice has not so much memory.
        """
        try:
            version, arrays, programs = described
            if version != internals.version():
                raise ValueError(f"JAX {version}, where {internals.version()} is needed")
            for id, device, dtype, dims, failure in arrays:
                self._restore_array(id, device, dtype, dims, failure, contents.get(id))
            for id, program, options, replicas, donated, nbytes in programs:
                self._restore_program(id, program, options, replicas, donated, nbytes)
        except (TypeError, LookupError, AttributeError) as e:
            raise ValueError(f"no session of JAX: {e}") from None

    def _restore_array(self, id: Any, device: Any, dtype: Any, dims: Any, failure: Any, content: Any) -> None:
        if type(id) is not int or device not in self._slices:
            raise ValueError(f"array {id!r:.20} on slice {device!r:.20}")
        if content is None:
            code, message, origin = failure
            if type(code) is not int or type(message) is not str or type(origin) is not int:
                raise ValueError(f"array {id} without elements")
            self._buffers[id] = Buffer(None, device, failure=StatusError(code, message, origin))
            return
        if not all(type(n) is int and n >= 0 for n in dims) or nbytes_of(dtype, dims) != content.nbytes:
            raise ValueError(f"array {id} of {content.nbytes} bytes")
        nbytes = rounded(content.nbytes)
        self._slices[device].take(nbytes)
        self._buffers[id] = Buffer(array_of(content, dtype, dims, self._devices[device]), device, nbytes)

    def _restore_program(
        self, id: Any, program: Any, options: Any, replicas: Any, donated: Any, nbytes: Any
    ) -> None:
        numbers = [number for replica in replicas for number in replica]
        kinds = [type(id), *map(type, donated), *map(type, nbytes)]
        if (
            type(program) is not bytes
            or type(options) is not bytes
            or set(kinds) != {int}
            or min([0, *nbytes])
        ):
            raise ValueError(f"program {id!r:.20}")
        if not numbers or not self._devices.keys() >= set(numbers):
            raise ValueError(f"a program for slices {numbers}")
        devices = [[self._devices[number] for number in replica] for replica in replicas]

        def compile() -> Program:
            return compiled(program, options, devices, 0, lambda *call: None)

        self._programs[id] = _Program((program, options), replicas, donated, nbytes, compile)

    # -- frames

    def run(self, header: Any, finish: Callable[[], None]) -> None:
        """Execute a RECORDS frame, and call ``finish`` at its end. Raises WireError for what is no command."""
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
            self._answer([e.code, e.message, e.origin], None)
        except (TypeError, ValueError, LookupError, AttributeError) as e:
            raise WireError(f"a command that makes no sense: {type(e).__name__}") from None
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
            ok = (
                dtype in DTYPES
                and nbytes_of(dtype, dims) == length
                and number in self._slices
                and type(id) is int
            )
            ok = ok and all(type(n) is int and n >= 0 for n in dims)
        except (TypeError, ValueError, KeyError):
            ok = False
        if not ok:
            raise WireError("an upload that is no array")
        data = aligned(length)
        if length:
            receive(data.data)
        self._free(freed)
        nbytes = rounded(length)
        try:
            self._take(number, nbytes)
            self._keep(id, Buffer(array_of(data, dtype, dims, self._devices[number]), number, nbytes))
        except StatusError as e:
            self._keep(id, Buffer(None, number, failure=_from(id, e)))
        finish()

    # -- commands

    def _compile(self, id: int, program: bytes, options: bytes, num_functions: int) -> None:
        began = time.perf_counter()
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
        one = _Program((program, options), numbers, found.donated, found.nbytes, lambda: found)
        one.calls = found.calls
        self._programs[id] = one
        self._running.note([self._slices[number] for number in several], None, began)
        self._answer([0, "", {**found.facts, "devices": numbers}], None)

    def _execute(self, id: int, inputs: Sequence[int], first: int, kept: Sequence[int]) -> None:
        began = time.perf_counter()
        given = self._programs[id]
        devices, outputs = given.devices, given.nbytes
        buffers = [self._buffers[k] for k in inputs]
        count = len(buffers) // len(devices)
        failure = next((b.failure for b in buffers if b.failure is not None), None)
        lost = [k for k in given.donated if k not in kept]
        lost = [place * count + k for place in range(len(devices)) for k in lost]
        taken: list[tuple[int, int]] = []
        made: list[list[Any]] = []
        run: Any = None
        program: Program | None = None
        if failure is None:
            try:
                program = given.compiled()
                arrays = [b.get() for b in buffers]
                for k in lost:
                    self._give(buffers[k])
                for device in devices:
                    self._take(device, sum(outputs) + program.temporary)
                    taken.append((device, sum(outputs) + program.temporary))
                for k in kept:
                    if k in program.donated:
                        for at in range(k, len(arrays), count):
                            arrays[at] = internals.copy(arrays[at])
                if program.layout is not None:
                    arrays = [internals.joined(arrays[k::count], program.layout) for k in range(count)]
                made, run = internals.execute(program.executable, arrays, program.calls)
                taken = [(device, program.temporary) for device in devices]
            except StatusError as e:
                failure = _from(first, e)
            except (RuntimeError, ValueError) as e:  # XLA's own
                failure = _from(first, _status(e))
            for device, nbytes in taken:
                self._slices[device].give(nbytes)
        for k in lost:
            self._free([inputs[k]])
        for place, device in enumerate(devices):
            for k, nbytes in enumerate(outputs):
                output = first + place * len(outputs) + k
                if failure is None and program is not None:
                    array, is_token = made[k][place], k in program.tokens
                    self._keep(output, Buffer(array, device, nbytes, is_token=is_token))
                else:
                    self._keep(output, Buffer(None, device, failure=failure))
        if program is not None and program.calls:
            self._runs[first + len(devices) * len(outputs)] = failure or run
        newest = made[-1][-1] if made else None
        self._running.note([self._slices[device] for device in devices], newest, began)

    def _usable(self, id: int) -> Buffer:
        buffer = self._buffers.get(id)
        if buffer is None:
            raise StatusError(NOT_FOUND, f"there is no array {id}")
        if buffer.failure is not None:
            raise buffer.failure
        return buffer

    def _read(self, id: int) -> None:
        buffer = self._usable(id)
        try:
            elements = Elements(np.asarray(buffer.get()))
        except (RuntimeError, ValueError) as e:  # XLA's own, of the program that computes it
            raise _status(e) from None
        self._answer([0, ""], elements)

    def _ready(self, id: int) -> None:
        buffer = self._usable(id)
        try:
            buffer.get().block_until_ready()
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
            original = source.get()
            nbytes = rounded(original.nbytes)
            self._take(number, nbytes)
            array = (
                internals.copy(original)
                if number == source.device
                else internals.put(original, self._devices[number])
            )
            self._keep(copy, Buffer(array, number, nbytes))
        except StatusError as e:
            self._keep(copy, Buffer(None, number, failure=_from(copy, e)))

    def _memory(self, number: int) -> None:
        one = self._slices[number]
        self._answer([0, "", one.taken(), one.limit], None)

    # -- the client's functions

    def _serve(self, bound_s: float) -> None:
        if self._own_desk is not None:
            calls.close_desk(self._own_desk)
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

    def _keep(self, id: int, buffer: Buffer) -> None:
        if id in self._buffers:
            raise WireError("an id that is in use")
        self._buffers[id] = buffer

    def _take(self, number: int, nbytes: int) -> None:
        one = self._slices[number]
        try:
            one.take(nbytes)
        except RuntimeError:
            limit, allocated = one.limit, one.taken()
            raise StatusError(
                RESOURCE_EXHAUSTED,
                f"Out of memory while trying to allocate {nbytes} bytes on slice {number}, which has {limit} bytes, of "
                f"which {allocated} are in use. Free arrays, or request GPUs with more memory (-p or -m).",
            ) from None

    def _give(self, buffer: Buffer) -> None:
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
                buffer.forget()


def _from(id: int, failure: StatusError) -> StatusError:
    """The failure of what makes the array ``id``, unless it comes from another one."""
    return failure if failure.origin else StatusError(failure.code, failure.message, id)


def _status(error: BaseException) -> StatusError:
    """XLA's own error."""
    return status_of(calls.failure_of(error))
