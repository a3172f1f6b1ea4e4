"""The names that executing a client's programs takes. Tried with the releases in :data:`.client.TESTED`."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import _jax, lapack, xla_client
from jax._src.lib.mlir.dialects import hlo as stablehlo
from jaxlib.mlir.passmanager import PassManager

from jupyter_gpupool.jax.protocol.protobuf import device_numbers, field, fields, number_field
from jupyter_gpupool.jax.protocol.status import INVALID_ARGUMENT, StatusError

_preparing = threading.Lock()
_devices: list[Any] = []

#: How long the devices of a program wait for each other before the process is given up, in seconds: longer than any
#: function of a client's takes that one of them may wait for.
_MEETING_S = 3900
#: The inputs that a program takes over, in the first line of its text: aliases of outputs, and donors of memory.
_ALIASED = re.compile(r"\}: \((\d+), \{\}")
#: What JAX sets of itself, all numbers and switches.
_BUILD_OPTIONS = (
    "use_spmd_partitioning",
    "use_shardy_partitioner",
    "exec_time_optimization_effort",
    "memory_fitting_effort",
    "optimization_level",
    "memory_fitting_level",
    # lists of switches, one for each input or output
    "allow_spmd_sharding_propagation_to_parameters",
    "allow_spmd_sharding_propagation_to_output",
)
_DONOR = re.compile(r"\((\d+), \{\}\)")


def prepare(count: int) -> list[Any]:
    """Set JAX up in this process, and return ``count`` CPU devices, which stand for emulated GPUs."""
    with _preparing:
        if not _devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_enable_x64", True)  # a client's arrays keep their types
            jax.config.update("jax_num_cpu_devices", count)
            lapack._lapack.initialize()  # programs call LAPACK without it
            _devices.extend(jax.devices("cpu"))
        return _devices


def version() -> str:
    """Return the release of JAX."""
    return str(jax.__version__)


def assigned_devices(options: bytes) -> list[list[int]]:
    """Return the numbers of the devices of each replica that a program's options have; [] if they have none."""
    assignment = xla_client.CompileOptions.ParseFromString(options).device_assignment
    return [] if assignment is None else device_numbers(assignment.serialize())


def compile(
    program: bytes, options: bytes, replicas: Sequence[Sequence[Any]], functions: Sequence[Any] = ()
) -> Any:
    """Compile a program for the devices of each of its replicas. It may call these functions by their numbers.

    They are called in threads of XLA's, with an array for each operand and None for a token, and return a tuple of as
    many arrays as there are results, contiguous and of exactly their types and shapes: XLA looks at none of that.
    """
    own = options_for(options, replicas)
    devices = tuple(device for devices in replicas for device in devices)
    client, placed = devices[0].client, xla_client.DeviceList(devices)
    if functions:  # which are taken with a module only
        with mlir.make_ir_context() as context:
            module = stablehlo.deserialize_portable_artifact(context, program)
            return client.compile_and_load(module, placed, own, list(functions))
    return client.compile_and_load(program, placed, own)


def options_for(options: bytes, replicas: Sequence[Sequence[Any]]) -> Any:
    """Return this process's options for a program with a client's options, on the devices of each of its replicas."""
    own = _own_options(xla_client.CompileOptions.ParseFromString(options))
    own.num_replicas, own.num_partitions = len(replicas), len(replicas[0])
    if own.num_replicas * own.num_partitions > 1:
        own.env_option_overrides = [("xla_cpu_collective_call_terminate_timeout_seconds", str(_MEETING_S))]
    numbers = [[device.id for device in devices] for devices in replicas]
    own.device_assignment = xla_client.DeviceAssignment.create(np.array(numbers))
    return own


def without_lines(program: bytes) -> bytes:
    """Return a program without the lines of the client's sources that it comes from."""
    with mlir.make_ir_context() as context:
        module = stablehlo.deserialize_portable_artifact(context, program)
        PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        return mlir.module_to_bytecode(module)


def _own_options(asked: Any) -> Any:
    """Return options of this process, with what is harmless of a client's: others name files, or reach into LLVM.

    Raises StatusError for an option that there is not.
    """
    for name, _ in asked.env_option_overrides:
        if not name.startswith(("xla_", "gpupool_")) and name not in _BUILD_OPTIONS:
            raise StatusError(INVALID_ARGUMENT, f"No such compile option: '{name}'")
    own = xla_client.CompileOptions()
    own.parameter_is_tupled_arguments = asked.parameter_is_tupled_arguments
    for name in _BUILD_OPTIONS:
        with contextlib.suppress(TypeError):  # the levels of 0.7, which Python cannot read there
            setattr(own.executable_build_options, name, getattr(asked.executable_build_options, name))
    theirs, ours = asked.executable_build_options.debug_options, own.executable_build_options.debug_options
    ours.xla_backend_optimization_level = max(0, min(3, theirs.xla_backend_optimization_level))
    ours.xla_llvm_disable_expensive_passes = theirs.xla_llvm_disable_expensive_passes
    return own


def outputs(executable: Any) -> list[tuple[str, list[int]]]:
    """Return the types, by NumPy's names, and the shapes of a program's outputs."""
    module = executable.hlo_modules()[0].as_serialized_hlo_module_proto()
    result = xla_client.XlaComputation(module).program_shape().result_shape()
    shapes = result.tuple_shapes() if result.is_tuple() else [result]
    return [
        (str(np.dtype(shape.numpy_dtype())), list(shape.dimensions())) if shape.is_array() else ("token", [])
        for shape in shapes
    ]


def donated(executable: Any) -> list[int]:
    """Return the numbers of the inputs that a program takes over."""
    first = executable.hlo_modules()[0].to_string().split("\n", 1)[0]
    found: set[int] = set()
    for name, pattern in (("input_output_alias=", _ALIASED), ("buffer_donor=", _DONOR)):
        _, there, rest = first.partition(name)
        if there:
            found.update(int(number) for number in pattern.findall(_braced(rest)))
    return sorted(found)


def given(program: bytes) -> bytes:
    """Return a client's program as a HloModuleProto, before it is compiled."""
    return bytes(
        _jax.mlir.mlir_module_to_xla_computation(program, False, False).as_serialized_hlo_module_proto()
    )


def compiled(executable: Any) -> list[bytes]:
    """Return the HloModuleProtos of a program, as they are executed."""
    return [bytes(module.as_serialized_hlo_module_proto()) for module in executable.hlo_modules()]


def _braced(text: str) -> str:
    """The beginning of a text up to the brace that closes its first one."""
    depth = 0
    for k, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[: k + 1]
    return text


def memory(executable: Any) -> dict[str, int]:
    """Return the bytes of a program's memory."""
    stats = executable.get_compiled_memory_stats()
    names = ("generated_code", "argument", "output", "alias", "temp")
    return {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in names}


def name(executable: Any) -> str:
    """Return a program's name."""
    return str(executable.hlo_modules()[0].name)


def optimized(executable: Any, replicas: int, partitions: int) -> bytes:
    """Return a program as a HloModuleProtoWithConfig, whose config has the layout of its entry."""
    module = executable.hlo_modules()[0].as_serialized_hlo_module_proto()
    shape = b"".join(fields(module, 4))
    counts = number_field(4, replicas) + number_field(5, partitions)
    return field(1, module) + field(2, field(1, shape) + counts)


def execute(executable: Any, inputs: Sequence[Any], waits: bool = False) -> tuple[list[list[Any]], Any]:
    """Run a program, and return each output's arrays, one a device, without waiting for them.

    The second result waits for the end of the run by ``block_until_ready()``; None unless ``waits``.
    ``inputs``: an array each; of a program of several devices, see :func:`joined`.
    """
    results = executable.execute_sharded(list(inputs), with_tokens=waits)
    run = results.consume_token() if waits else None
    return results.disassemble_into_single_device_arrays(), run


def layout_of(devices: Sequence[Any]) -> Any:
    """Return what :func:`joined` needs to know of a program's devices."""
    mesh = jax.sharding.Mesh(np.array(devices), ("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def joined(arrays: Sequence[Any], layout: Any) -> Any:
    """Return the arrays of all devices for one input as a single array, whatever part of it each of them is.

    Raises ValueError where they are of different shapes, or not those of the devices in their order.
    """
    return jax.make_array_from_single_device_arrays(arrays[0].shape, layout, list(arrays))


def put(elements: np.ndarray[Any, Any], device: Any) -> Any:
    """Return an array on a device."""
    return jax.device_put(elements, device)


def copy(array: Any) -> Any:
    """Return a copy of an array on its device."""
    return jax.numpy.array(array, copy=True)
