"""JAX programs under stress: many steps in many threads, the worker's end within a step, and frames of every kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.transport import frames, handshake

from ..conftest import often

#: A worker may start slowly on a busy machine, in seconds.
PATIENCE_S = 300.0
#: Steps of all threads together, before and after which memory is measured.
STEPS = often(800, 10_000)
#: What the allocators of either process may keep of what was freed, in MiB.
MAX_GROWTH_MIB = 48

MANY_STEPS = """
import gc, sys, threading
import jax, jax.numpy as jnp, psutil
import numpy as np

def loss(parameters, x):
    return jnp.mean((jnp.tanh(x @ parameters["a"]) @ parameters["b"]) ** 2)

@jax.jit
def update(parameters, x):
    value, gradients = jax.value_and_grad(loss)(parameters, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), value
donating = jax.jit(update, donate_argnums=0)

def work(steps):
    parameters = {"a": jnp.ones((16, 32)) / 100, "b": jnp.ones((32, 1))}
    for k in range(steps):
        x = jnp.asarray(np.full((8, 16), k / steps, np.float32))
        parameters, value = (donating if k % 2 else update)(parameters, x)
        if k % 7 == 0:
            losses.append(float(value))
        if k % 50 == 0:
            try:
                (lambda kept: kept + "a")([value + n for n in range(5)])  # they are destroyed with an exception
            except TypeError:
                failed.append(k)

def train(steps):
    threads = [threading.Thread(target=work, args=(steps // 8,)) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(losses) == 8 * len(range(0, steps // 8, 7)) and len(failed) == 8 * len(range(0, steps // 8, 50))
    losses.clear(), failed.clear(), gc.collect()
    (stats,) = (device.memory_stats() for device in jax.devices())
    resident = psutil.Process().memory_info().rss >> 20
    print(stats["bytes_in_use"], len(gc.get_objects()), resident, flush=True)

losses, failed = [], []
for steps in map(int, sys.argv[1:]):
    train(steps)
    sys.stdin.readline()
"""


@pytest.mark.soak
def test_many_steps_in_eight_threads_leave_nothing_on_either_side(
    prepare_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    worker = start_worker()
    serving = psutil.Process(worker.process.pid)
    seen = []
    with prepare_program(MANY_STEPS, worker.spec, str(STEPS // 4), str(STEPS)).start() as program:
        for _ in range(2):
            line = program.stdout.readline()
            assert line, "the program ended"
            seen.append([*map(int, line.split()), serving.memory_info().rss >> 20])
            program.stdin.write("\n")
            program.stdin.flush()
    assert program.returncode == 0
    (in_use, objects, resident_mib, served_mib), later = seen
    assert in_use == later[0] == 0, "bytes of the slice"
    assert later[1] < objects + 500, "Python's objects in the program"
    assert later[2] < resident_mib + MAX_GROWTH_MIB, "the program's memory"
    assert later[3] < served_mib + MAX_GROWTH_MIB, "the worker's memory"


KILLED_IN_A_STEP = """
import jax, jax.numpy as jnp, numpy as np, os, signal, sys
def kill(k):
    if k == 5:
        os.kill(int(sys.argv[1]), signal.SIGKILL)
    return k

@jax.jit
def step(x):
    def body(k, x):
        return x @ x / 50 + jax.pure_callback(kill, jax.ShapeDtypeStruct((), np.int32), k)
    return jax.lax.fori_loop(0, 10, body, x)

add = jax.jit(lambda x: x + 1)
before = add(jnp.zeros((50, 50)))
for wanted in (lambda: add(step(before)), lambda: before, lambda: step(before)):
    try:
        wanted().tolist()
    except jax.errors.JaxRuntimeError as e:
        print(str(e).splitlines()[0])
print((jax.device_put(np.ones(2), jax.devices("cpu")[0]) + 1).tolist())
"""


def test_a_worker_killed_within_a_step_is_an_exception_and_the_program_goes_on(
    run_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    worker = start_worker()
    done = run_program(KILLED_IN_A_STEP, worker, str(worker.process.pid))
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert len(errors) == 3 and all(line.startswith("UNAVAILABLE") for line in errors), done.stdout
    assert last == "[2.0, 2.0]"


numbers = st.integers(-2, 6) | st.integers(-(2**63), 2**64 - 1)
words = st.sampled_from(["float32", "int8", "bool", "token", ""]) | st.text(max_size=5)
plain = numbers | words | st.none() | st.booleans() | st.floats() | st.binary(max_size=40)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=2), max_leaves=6
)
ids = st.lists(st.integers(-1, 6), max_size=3)


def _command(code: int) -> st.SearchStrategy[list[Any]]:
    fields = st.lists(ids | values, min_size=commands.FIELDS[code], max_size=commands.FIELDS[code])
    return st.builds(lambda freed, fields: [code, freed, *fields], ids | values, fields)


records = st.one_of(*map(_command, sorted(commands.FIELDS)), values)
dims = st.lists(st.integers(-1, 4), max_size=3)
uploads = st.tuples(
    st.builds(lambda id, *fields: [id, [*fields]], numbers, ids, words, dims, st.integers(-1, 2)) | values,
    st.binary(max_size=64),
)


@pytest.mark.soak
@given(st.lists(records | uploads, max_size=6))
@settings(
    max_examples=often(40, 4000), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_whatever_a_client_sends_the_worker_serves_the_next_one(worker: Any, sent: list[Any]) -> None:
    hello = {"framework": "jax", "jax": "0.0", "session": os.urandom(16).hex(), "generation": 1}
    connection, _ = handshake.connect(
        worker.spec, "session", {**hello, "received": 0, "new": True}, PATIENCE_S
    )
    with connection:
        try:
            for one in sent:
                if isinstance(one, tuple):
                    frames.send(connection, frames.Kind.UPLOAD, one[0], memoryview(one[1]))
                else:
                    frames.send(connection, frames.Kind.RECORDS, one)
            frames.send(connection, frames.Kind.RECORDS, "the end")
        except ConnectionError:
            pass  # it has said BYE already
        kind = None
        while kind is not frames.Kind.BYE:
            kind, said, length = frames.receive(connection)
            frames.receive_into(connection, memoryview(bytearray(length)))
    assert "something invalid" in said["message"]
    assert worker.process.is_alive()


def test_after_that_it_computes_and_has_kept_nothing(run_program: Callable[..., Any], worker: Any) -> None:
    program = (
        "import jax; (d,) = jax.devices(); print(d.memory_stats()['bytes_in_use'], jax.numpy.ones(3).sum())"
    )
    done = run_program(program, worker)
    assert done.stdout == "0 3.0\n", done.stderr
