"""Functions of a JAX program's own process, which it calls from a slice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jupyter_gpupool.jax.protocol.arrays import packed, unpacked
from jupyter_gpupool.jax.worker.calls import CallDesk, CallFailed, results_by_function
from jupyter_gpupool.jax.worker.custom_calls import Array


def test_functions_are_called_as_on_the_cpu(run_program: Callable[..., Any], worker: Any) -> None:
    done = run_program("calls.py", worker)
    assert done.returncode == 0, done.stderr
    printed, refused, in_use = done.stdout.splitlines()
    assert printed == "printed [0. 1. 2.]" and refused == "1" and int(in_use) <= 2048


SLOW = """
import jax, jax.numpy as jnp, numpy as np, threading
def slow(a):
    threading.Event().wait()
f = jax.jit(lambda x: jax.pure_callback(slow, jax.ShapeDtypeStruct((), np.float32), x))
try:
    f(1.0).block_until_ready()
except jax.errors.JaxRuntimeError as e:
    print(str(e).splitlines()[0])
print((jnp.ones(2) + 1).tolist())
"""


def test_a_function_that_does_not_return_is_an_error_and_the_program_goes_on(
    run_program: Callable[..., Any], worker: Any
) -> None:
    done = run_program(SLOW, worker, GPUPOOL_JAX_CALL_TIMEOUT_S="1")
    assert done.returncode == 0, done.stderr
    error, last = done.stdout.splitlines()
    assert (
        error == "INTERNAL: CpuCallback error calling callback: the program's function took longer than 1 s"
    )
    assert last == "[2.0, 2.0]"


MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P, NamedSharding
mesh = Mesh(np.array(jax.devices()), ("x",))
seen = []
def note(k, a):
    seen.append((int(k), a.tolist()))
    return a * 10
def body(v):
    k = jax.lax.axis_index("x")
    return jax.pure_callback(note, jax.ShapeDtypeStruct(v.shape, v.dtype), k, v) + jax.lax.psum(v, "x")
f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
print(f(jnp.arange(4.0)).tolist(), sorted(seen))
x = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, P("x")))
whole = []
jax.jit(lambda v: (jax.debug.callback(lambda a: whole.append(a.tolist()), v), v + 1)[1])(x).block_until_ready()
jax.effects_barrier()
print(whole)
"""


def test_a_program_of_two_slices_calls_a_function_for_each(
    run_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    done = run_program(MESH, start_worker(2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[2.0, 14.0, 22.0, 34.0] [(0, [0.0, 1.0]), (1, [2.0, 3.0])]",
        "[[0.0, 1.0, 2.0, 3.0]]",
    ]


def called(desk: CallDesk, results: tuple[Array, ...]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def call() -> None:
        try:
            found.extend(desk.call(7, 0, [np.ones(2, np.float32)], results))
        except CallFailed as e:
            found.append(str(e))

    thread = threading.Thread(target=call)
    thread.start()
    return thread, found


WANTED = (Array("float32", (2,)), Array("int8", ()))


@pytest.mark.parametrize(
    "results",
    [
        [np.ones(2, np.float32)],
        [np.ones(3, np.float32), np.int8(1)],
        [np.ones(2, np.float64), np.int8(1)],
        [np.ones(2, np.float32), np.int8([1])],
        [np.ones(2, np.float32), None],
        [],
    ],
    ids=range(6),
)
def test_results_that_do_not_fit_reach_no_program(results: list[Any]) -> None:
    desk = CallDesk(900.0)
    thread, found = called(desk, WANTED)
    call = desk.take(900.0)
    assert call is not None and (call.program, call.operands[0].tolist()) == (7, [1.0, 1.0])
    desk.give(call.number, results)
    thread.join()
    assert len(found) == 1 and "in place of float32[2], int8[]" in found[0]


def test_calls_end_with_the_client_and_late_answers_are_forgotten() -> None:
    desk = CallDesk(900.0)
    thread, found = called(desk, WANTED)
    call = desk.take(900.0)
    assert call is not None
    desk.close()
    thread.join()
    desk.give(call.number, [np.ones(2, np.float32), np.int8(1)])
    assert found == ["the program whose function is called has gone"]


def test_arrays_travel_whole_and_nothing_else_is_an_array() -> None:
    arrays = [np.arange(6, dtype=np.int16).reshape(2, 3), None, np.zeros((0, 2)), np.array(True)]
    facts, data = packed(arrays)
    back = unpacked(facts, np.frombuffer(data, np.uint8))
    assert back[1] is None and back[0].tolist() == [[0, 1, 2], [3, 4, 5]] and back[2].shape == (0, 2)
    for wrong in (facts[:1], [["int16", [-2, -3]]], [["int16", [2]]], [["object", [1]]], 5, [["int16"]]):
        with pytest.raises((TypeError, ValueError, KeyError)):
            unpacked(wrong, np.frombuffer(data, np.uint8))


def test_a_function_returns_the_same_arrays_wherever_it_is_called() -> None:
    assert results_by_function([(0, WANTED), (1, ()), (0, WANTED)]) == {0: WANTED, 1: ()}
    with pytest.raises(ValueError, match="different arrays"):
        results_by_function([(0, WANTED), (0, WANTED[:1])])
    with pytest.raises(ValueError, match="returns 21"):
        results_by_function([(0, (Array("21", ()),))])
