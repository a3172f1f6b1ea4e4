"""Compiles programs, and keeps them for every session of the lease: what was compiled once is only looked up.

A worker serves one lease, so that nothing is kept from one tenant for another.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.jax.jax_internals import worker as internals
from jupyter_gpupool.jax.protocol.dtypes import OUTPUTS, TOKEN, nbytes_of
from jupyter_gpupool.jax.protocol.status import UNIMPLEMENTED, StatusError, status_of

from . import calls
from .allowed_calls import function_of, objection
from .custom_calls import Array, custom_calls

#: Memory is counted in pieces of so many bytes, as for PyTorch.
_GRAIN = 512
#: The most functions of the client that a program calls.
_MAX_FUNCTIONS = 10_000
#: The most programs that are kept for other sessions.
_MAX_KEPT = 256

#: Calls a function of the client by its number, with its operands and the arrays that it has to return.
CallFunction = Callable[[int, Sequence[Any], Sequence[Array]], Any]


@dataclass(frozen=True)
class Program:
    """A compiled program, and what a client is told of it. Bytes are those of each device."""

    executable: Any
    layout: Any
    facts: Mapping[str, Any]
    #: the numbers of the inputs that it takes over
    donated: Sequence[int]
    #: what each output takes
    nbytes: Sequence[int]
    temporary: int
    #: the numbers of the outputs that have no elements, see protocol/dtypes.py
    tokens: frozenset[int]
    #: whether it calls functions of the client
    calls: bool


_lock = threading.Lock()
_kept: OrderedDict[bytes, Program] = OrderedDict()


def compiled(
    program: bytes,
    options: bytes,
    devices: Sequence[Sequence[Any]],
    num_functions: int,
    call: CallFunction,
) -> Program:
    """Compile a program for the devices of each of its replicas, or find it among those that were compiled before.

    It may call ``num_functions`` functions of the client. Raises StatusError.
    """
    try:
        if num_functions:  # which are those of one process
            return _compiled(program, options, devices, num_functions, call)
        key = _key(program, options, devices)
        with _lock:
            found = _kept.get(key)
            if found is not None:
                _kept.move_to_end(key)
                return found
        found = _compiled(program, options, devices, 0, call)
        with _lock:
            _kept[key] = found
            if len(_kept) > _MAX_KEPT:
                _kept.popitem(last=False)
        return found
    except ValueError as e:
        raise StatusError(UNIMPLEMENTED, str(e)) from None
    except RuntimeError as e:  # XLA's own
        raise status_of(calls.failure_of(e)) from None


def _key(program: bytes, options: bytes, devices: Sequence[Sequence[Any]]) -> bytes:
    found = hashlib.sha256()
    for part in (
        internals.without_lines(program),
        internals.options_for(options, devices).SerializeAsString(),
    ):
        found.update(len(part).to_bytes(8, "big") + part)
    return found.digest()


def _compiled(
    program: bytes,
    options: bytes,
    devices: Sequence[Sequence[Any]],
    num_functions: int,
    call: CallFunction,
) -> Program:
    results: dict[int, tuple[Array, ...]] = {}

    def function(number: int) -> Callable[..., Any]:
        return lambda *operands: call(number, operands, results[number])

    functions = [function(k) for k in range(min(num_functions, _MAX_FUNCTIONS))]
    _check(internals.given(program), False, len(functions))
    executable = internals.compile(program, options, devices, functions)
    made = [
        one  # what is executed is what counts
        for module in internals.compiled(executable)
        for one in _check(module, True, len(functions))
    ]
    results.update(calls.results_by_function(made))
    outputs = internals.outputs(executable)
    for dtype, _ in outputs:
        if dtype not in OUTPUTS:
            raise ValueError(f"an output of type {dtype} is not supported on a slice yet")
    facts: dict[str, Any] = {
        "name": internals.name(executable),
        "outputs": outputs,
        "donated": internals.donated(executable),
        "fingerprint": str(executable.fingerprint or ""),
        "memory": internals.memory(executable),
        "optimized": internals.optimized(executable, len(devices), len(devices[0])),
        "calls": bool(made),
    }
    several = [device for replica in devices for device in replica]
    return Program(
        executable,
        internals.layout_of(several) if len(several) > 1 else None,
        facts,
        facts["donated"],
        [rounded(nbytes_of(dtype, dims)) for dtype, dims in outputs],
        rounded(facts["memory"]["temp"]),
        frozenset(k for k, (dtype, _) in enumerate(outputs) if dtype == TOKEN),
        bool(made),
    )


def _check(module: bytes, is_compiled: bool, num_functions: int) -> list[tuple[int, tuple[Array, ...]]]:
    """Return the client's functions that a HloModuleProto calls, with the results of each.

    Raises ValueError for a module that calls what it may not.
    """
    found = []
    for one in custom_calls(module):
        if why := objection(one, is_compiled, num_functions):
            raise ValueError(why)
        function = function_of(one)
        if function is not None:
            found.append((function, one.results))
    return found


def rounded(nbytes: int) -> int:
    """Return the bytes that an array of ``nbytes`` takes of a slice."""
    return -(-nbytes // _GRAIN) * _GRAIN
