"""Programs: compiled by the worker, and executed there without waiting for it."""

from __future__ import annotations

import ctypes
from typing import Any

from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.jax.protocol.dtypes import OUTPUTS, nbytes_of
from jupyter_gpupool.jax.protocol.protobuf import device_assignment
from jupyter_gpupool.jax.protocol.status import INVALID_ARGUMENT, UNIMPLEMENTED, StatusError

from .devices import KIND, Devices, Texts, handles
from .functions import Functions, Group
from .layouts import STRUCTURES
from .native import Native
from .session import SliceSession

_EXECUTE_OPTIONS = STRUCTURES["ExecuteOptions"]
#: Where a handle has its id, see handles.c.
_ID_OFFSET = 16
#: The fields of Executable_GetCompiledMemoryStats that a worker tells.
_MEMORY = ("generated_code", "argument", "output", "alias", "temp")


def id_of(handle: int) -> int:
    """Return the id in a handle."""
    return ctypes.c_int64.from_address(handle + _ID_OFFSET).value


class _Facts(ctypes.Structure):
    """struct program of handles.c."""

    _fields_ = [
        ("num_replicas", ctypes.c_size_t),
        ("num_partitions", ctypes.c_size_t),
        ("num_outputs", ctypes.c_size_t),
        ("element_types", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("nbytes", ctypes.c_void_p),
        ("dims", ctypes.c_void_p),
        ("num_donated", ctypes.c_size_t),
        ("donated", ctypes.c_void_p),
        ("devices", ctypes.c_void_p),
        ("memories", ctypes.c_void_p),
    ]


class Program:
    """What XLA asks of a program, with the memory in which the answers stay."""

    def __init__(self, id: int, facts: dict[str, Any], options: bytes, devices: Devices) -> None:
        self.id = id
        self.name: str = facts["name"]
        self.fingerprint: str = facts["fingerprint"]
        self.memory: dict[str, int] = facts["memory"]
        #: the functions of this process that it calls
        self.functions: Group | None = None
        self.options = ctypes.create_string_buffer(options, len(options))
        replicas: list[list[int]] = facts["devices"]
        num_replicas, num_partitions = len(replicas), len(replicas[0])
        numbers = [number for replica in replicas for number in replica]
        #: how many devices it has
        self.num_devices = len(numbers)
        assignment = device_assignment(replicas)
        self.assignment = ctypes.create_string_buffer(assignment, len(assignment))
        self.devices = handles([devices.device[number] for number in numbers])
        self._memories = handles([devices.memory[number] for number in numbers])
        outputs, donated = facts["outputs"], facts["donated"]
        self.num_outputs = count = len(outputs)
        flat = [length for _, dims in outputs for length in dims]
        self.types = (ctypes.c_int32 * count)(*(OUTPUTS[dtype][0] for dtype, _ in outputs))
        self.dims = (ctypes.c_int64 * len(flat))(*flat)
        self.dim_sizes = (ctypes.c_size_t * count)(*(len(dims) for _, dims in outputs))
        self._nbytes = (ctypes.c_size_t * count)(*(nbytes_of(dtype, dims) for dtype, dims in outputs))
        self._donated = (ctypes.c_size_t * len(donated))(*donated)
        address = ctypes.addressof
        self._facts = _Facts(
            *(num_replicas, num_partitions, count),
            *(address(self.types), address(self.dim_sizes), address(self._nbytes), address(self.dims)),
            *(len(donated), address(self._donated), address(self.devices), address(self._memories)),
        )
        #: what its handle leads to
        self.address = ctypes.addressof(self._facts)
        self.kinds: Any = None
        self.kind_sizes: Any = None
        self.optimized: bytes = facts["optimized"]
        ids = [k for r in range(num_replicas) for p in range(num_partitions) for k in (r, p)]
        self.logical_ids = (ctypes.c_int32 * len(ids))(*ids)


class Programs:
    """Answers what XLA asks of programs."""

    def __init__(self, devices: Devices, native: Native, texts: Texts, functions: Functions) -> None:
        self._devices = devices
        self._functions = functions
        self._native = native
        self._texts = texts
        self._known: dict[int, Program] = {}

    @property
    def _session(self) -> SliceSession:
        assert self._devices.session is not None, "programs are compiled after the client was made"
        return self._devices.session

    def _program(self, handle: int) -> Program:
        return self._known[id_of(handle)]

    def compile(self, a: Any) -> None:
        """Let the worker compile a program."""
        program = STRUCTURES["Program"].from_address(a.program)
        form = ctypes.string_at(program.format, program.format_size)
        if form != b"mlir":
            raise StatusError(
                UNIMPLEMENTED, f"a program in the format {form.decode()} is not supported on a slice"
            )
        self._functions.refuse_inside()
        options = ctypes.string_at(a.options, a.options_size)
        id = self._session.new_ids()
        code = ctypes.string_at(program.code, program.code_size)
        group = self._functions.of(options)
        count = len(group.functions) if group is not None else 0
        (facts,) = self._session.answer(commands.COMPILE, id, code, options, count)
        made = Program(id, facts, options, self._devices)
        if group is not None and facts["calls"]:
            self._functions.serve(self._session, id, group)
            made.functions = group
        self._known[id] = made
        a.executable = self._native.program(id, made.address)

    def forget(self, ids: list[int]) -> None:
        """Forget programs that XLA has destroyed."""
        for id in ids:
            self._known.pop(abs(id), None)

    def __len__(self) -> int:
        return len(self._known)

    def execute(self, a: Any) -> None:
        """Send a program's inputs' ids. Its outputs exist from now on, whenever the worker computes them."""
        program = self._known[id_of(a.executable)]
        native, num_devices = self._native, program.num_devices
        if a.num_devices != num_devices:
            raise StatusError(INVALID_ARGUMENT, f"{a.num_devices} devices for a program of {num_devices}")
        address = ctypes.addressof(a)
        ids = (ctypes.c_int64 * (num_devices * a.num_args))()
        if not native.inputs(address, ctypes.addressof(ids)):
            raise StatusError(INVALID_ARGUMENT, "an input of the program has been deleted or donated")
        options = _EXECUTE_OPTIONS.from_address(a.options)
        count = options.num_non_donatable
        kept = (ctypes.c_int64 * count).from_address(options.non_donatable)[:] if count else []
        calls = program.functions is not None
        count = num_devices * program.num_outputs + calls  # the id of the run is the last one
        try:
            first = self._session.execute(program.id, ids[:], count, kept)
        except StatusError:  # reported where an output is used, as every failure of a program
            first = self._session.new_ids(count)
        if not native.outputs(address, first, not calls):
            raise MemoryError("for the handles of a program's outputs")
        if calls:
            events = a.device_complete_events
            waits = list((ctypes.c_void_p * num_devices).from_address(events)) if events else []
            self._await(program, first + count - 1, waits)

    def _await(self, program: Program, run: int, events: list[int]) -> None:
        """Keep a program's functions until a run of it has ended, and set the events then."""
        native, kept = self._native, [program.functions]

        def done(answer: Any, error: StatusError | None) -> None:
            kept.clear()
            text = error.message.encode() if error else b""
            for event in events:
                native.set(event, error.code if error else 0, text, len(text))

        try:
            self._session.ask(done, commands.RAN, run)
        except StatusError as e:
            done(None, e)

    def delete(self, a: Any) -> None:
        """Free a program before XLA destroys it."""
        if self._native.delete(a.buffer):
            self._session.free([id_of(a.buffer)])

    # -- facts

    def name(self, a: Any) -> None:
        """Its name."""
        a.text, a.size = self._texts.get(self._program(a.executable).name)

    def fingerprint(self, a: Any) -> None:
        """What tells it from others."""
        a.text, a.size = self._texts.get(self._program(a.executable).fingerprint)

    def code_size(self, a: Any) -> None:
        """The bytes of its code."""
        a.number = self._program(a.executable).memory["generated_code"]

    def no_cost(self, a: Any) -> None:
        """An analysis without any property."""
        a.num_properties, a.properties = 0, None

    def output_types(self, a: Any) -> None:
        """The types of its outputs."""
        program = self._program(a.executable)
        a.types, a.num_outputs = ctypes.addressof(program.types), program.num_outputs

    def output_dims(self, a: Any) -> None:
        """The shapes of its outputs."""
        program = self._program(a.executable)
        a.num_outputs = program.num_outputs
        a.dims, a.dim_sizes = ctypes.addressof(program.dims), ctypes.addressof(program.dim_sizes)

    def output_memory_kinds(self, a: Any) -> None:
        """Every output is in the device's memory."""
        program = self._program(a.executable)
        count = program.num_outputs
        if program.kinds is None:
            address, size = self._texts.get(KIND)
            program.kinds = (ctypes.c_void_p * count)(*[address] * count)
            program.kind_sizes = (ctypes.c_size_t * count)(*[size] * count)
        a.num_outputs = count
        a.kinds, a.kind_sizes = ctypes.addressof(program.kinds), ctypes.addressof(program.kind_sizes)

    def memory_stats(self, a: Any) -> None:
        """The bytes of its memory."""
        start = type(a).generated_code.offset
        ctypes.memset(ctypes.addressof(a) + start, 0, min(a.struct_size, ctypes.sizeof(a)) - start)
        known = self._program(a.executable).memory
        for name in _MEMORY:
            setattr(a, name, known[name])

    def optimized(self, a: Any) -> None:
        """The program as XLA has optimized it: first its size, then, where there is room for it, itself."""
        program = self._program(a.executable)
        into = STRUCTURES["Program"].from_address(a.program)
        into.format, into.format_size = self._texts.get("hlo_with_config")
        if into.code:
            ctypes.memmove(into.code, program.optimized, len(program.optimized))
        into.code_size = len(program.optimized)

    def addressable(self, a: Any) -> None:
        """Its devices."""
        program = self._program(a.executable)
        a.devices, a.num_devices = ctypes.addressof(program.devices), len(program.devices)

    def logical_ids(self, a: Any) -> None:
        """The places of its devices among its replicas and partitions."""
        program = self._program(a.executable)
        a.ids, a.num_ids = ctypes.addressof(program.logical_ids), program.num_devices

    def compile_options(self, a: Any) -> None:
        """The options with which it was compiled."""
        self._show(a, self._program(a.executable).options)

    def assignment(self, a: Any) -> None:
        """Its devices, as DeviceAssignmentProto."""
        self._show(a, self._program(a.executable).assignment)

    def _show(self, a: Any, message: ctypes.Array[ctypes.c_char]) -> None:
        a.data, a.size, a.holder = ctypes.addressof(message), len(message), ctypes.addressof(message)
        a.deleter = self._native.address("nothing")

    #: What fills which place of the table, with its structure.
    PLACES = {
        "Client_Compile": (compile, "Client_Compile"),
        "LoadedExecutable_Execute": (execute, "LoadedExecutable_Execute"),
        "LoadedExecutable_Delete": (delete, "Buffer"),
        "LoadedExecutable_AddressableDevices": (addressable, "LoadedExecutable_AddressableDevices"),
        "LoadedExecutable_AddressableDeviceLogicalIds": (
            logical_ids,
            "LoadedExecutable_AddressableDeviceLogicalIds",
        ),
        "LoadedExecutable_GetDeviceAssignment": (assignment, "LoadedExecutable_GetDeviceAssignment"),
        "LoadedExecutable_Fingerprint": (fingerprint, "Executable_Text"),
        "Executable_Name": (name, "Executable_Text"),
        "Executable_Fingerprint": (fingerprint, "Executable_Text"),
        "Executable_SizeOfGeneratedCodeInBytes": (code_size, "Executable_Number"),
        "Executable_GetCostAnalysis": (no_cost, "Executable_GetCostAnalysis"),
        "Executable_OutputElementTypes": (output_types, "Executable_OutputElementTypes"),
        "Executable_OutputDimensions": (output_dims, "Executable_OutputDimensions"),
        "Executable_OutputMemoryKinds": (output_memory_kinds, "Executable_OutputMemoryKinds"),
        "Executable_GetCompiledMemoryStats": (memory_stats, "Executable_GetCompiledMemoryStats"),
        "Executable_OptimizedProgram": (optimized, "Executable_OptimizedProgram"),
        "Executable_GetCompileOptions": (compile_options, "Executable_GetCompileOptions"),
    }
