"""A lease that runs JAX is parked and moved, and its program does not notice."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.transport.lifeline import Lifeline

from ..engines.local.test_engine import granted
from ..engines.local.test_moving import Pair
from ..engines.local.test_parking import Server, elsewhere

STEPS = 6


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, library: None) -> Iterator[list[Server]]:
    servers = [
        Server(tmp_path_factory.mktemp(f"server{k}") / "run", park_memory_mib=64, clean_after_s=0.0)
        for k in range(2)
    ]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def pair(servers: list[Server], tmp_path: Path) -> Iterator[Pair]:
    """A lease of 100 MiB at the first of two servers."""
    pair = Pair(servers, granted(memory_mib=100), tmp_path / "lease.json")
    line = Lifeline(pair.spec, locate=lambda: pair.spec)
    yield pair
    line.release()
    for server in servers:
        server.do(server.engine.stop_worker(pair.lease.id))
        server.ended.clear()
        server.woken.clear()


@pytest.fixture
def start_program(prepare_program: Callable[..., Any], pair: Pair) -> Iterator[Callable[..., Any]]:
    """Start a program with the lease; it is ended with the test."""
    with contextlib.ExitStack() as started:

        def start(program: str, *arguments: str) -> subprocess.Popen[str]:
            process = prepare_program(program, pair.spec, *arguments).start()
            started.enter_context(process)
            started.callback(process.kill)
            return process  # type: ignore[no-any-return]

        yield start


def talk(process: subprocess.Popen[str], between: Callable[[], object]) -> str:
    """Let a program go on each time that it says ``next``, after ``between``; return what else it says first."""
    assert process.stdin is not None and process.stdout is not None
    for line in process.stdout:
        if line != "next\n":
            return line.strip()
        between()
        process.stdin.write("\n")
        process.stdin.flush()
    raise AssertionError("it has ended")


def go_on(process: subprocess.Popen[str]) -> str:
    """Let a program go on, and return the next line that it says."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def wake(pair: Pair, eventually: Callable[..., Any], where: str) -> None:
    """Bring a lease back once its program needs it."""
    eventually(lambda: pair.lease.id in pair.here.woken, "the program wakes its lease")
    pair.here.woken.clear()
    pair.here.do(pair.here.engine.resume_worker(elsewhere(pair.lease, where)))


def park(pair: Pair) -> Lease:
    pair.here.do(pair.here.engine.park_worker(pair.lease))
    return pair.lease


def at_rest(do: Callable[[], object]) -> None:
    """Do something again for as long as the worker says that it computes: a program may be compiled just then."""
    while True:
        try:
            do()
            return
        except EngineError as e:
            if "it computes" not in str(e):
                raise


def test_a_program_gets_the_same_bits_while_it_is_parked_and_moved_between_its_steps(
    start_program: Callable[..., Any], pair: Pair
) -> None:
    undisturbed = talk(start_program("training.py", str(STEPS)), lambda: None)
    assert undisturbed.startswith("result ")
    turns = 0

    def disturb() -> None:
        nonlocal turns
        turns += 1
        if turns % 3:
            at_rest(lambda: park(pair))
        if turns % 3 == 1:
            pair.here.do(pair.here.engine.resume_worker(elsewhere(pair.lease, f"GPU-{turns}")))
        else:
            at_rest(pair.move)  # asleep, or awake

    assert talk(start_program("training.py", str(STEPS)), disturb) == undisturbed
    assert turns == STEPS + 1
    assert pair.moves == 4


READ = """
import gc, weakref
gc.disable()
import jax, jax.numpy as jnp
from jupyter_gpupool.jax.jax_internals import worker as internals
from jupyter_gpupool.jax.worker.buffers import Buffer
internals.prepare(1)
buffers = [Buffer(jnp.arange(1000, dtype="float32") + k, 0) for k in range(2)]
contents = [buffer.content(3600.0) for buffer in buffers]
print([content[:4].tolist() for content in contents])
views = [weakref.ref(content.base.owned) for content in contents]
del contents
parked, donated = buffers
parked.let_go(lambda: None)
where = donated.array.unsafe_buffer_pointer()
print(jax.jit(lambda x: x * 2, donate_argnums=0)(donated.array).unsafe_buffer_pointer() == where)
print([view() is None for view in views])
"""


def test_an_array_that_was_read_for_parking_is_freed_at_once_and_donated_in_place(
    run_program: Callable[..., Any],
) -> None:
    done = run_program(READ, None, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[0, 0, 0, 0], [0, 0, 128, 63]]", "True", "[True, True]"]


QUESTIONS = """
import sys, jax, jax.numpy as jnp
x, y = jnp.arange(1000), jnp.ones(1 << 18)
before = jax.devices()[0].memory_stats()["bytes_in_use"]
print((x + 1).sum().tolist(), flush=True)
sys.stdin.readline()
print(x.shape, x.dtype, jax.devices()[0].memory_stats()["bytes_in_use"] == before, flush=True)
sys.stdin.readline()
del y
print(jax.devices()[0].memory_stats()["bytes_in_use"] == before - (1 << 20), flush=True)
sys.stdin.readline()
print((x + 2).sum().tolist(), flush=True)
"""


def test_questions_do_not_wake_what_is_parked_and_a_program_does(
    start_program: Callable[..., Any], pair: Pair, eventually: Callable[..., Any]
) -> None:
    program = start_program(QUESTIONS)
    assert program.stdout.readline() == "500500\n"
    park(pair)
    assert go_on(program) == "(1000,) int32 True"
    assert go_on(program) == "True"
    assert not pair.here.woken, "it sleeps all the while"
    program.stdin.write("\n")
    program.stdin.flush()
    wake(pair, eventually, "GPU-1")
    assert program.stdout.readline() == "501500\n"


CALLS = """
import sys, jax, jax.numpy as jnp, numpy as np
def said(x):
    print("called", flush=True)
    sys.stdin.readline()
    return np.asarray(x) + 1
f = jax.jit(lambda x: jax.pure_callback(said, jax.ShapeDtypeStruct((3,), jnp.float32), x) * 2)
print(f(jnp.arange(3.0)).tolist(), flush=True)
sys.stdin.readline()
print(f(jnp.arange(3.0) + 1).tolist(), flush=True)
"""


def test_a_program_that_calls_functions_is_parked_between_its_calls_and_does_not_move(
    start_program: Callable[..., Any], pair: Pair, eventually: Callable[..., Any]
) -> None:
    program = start_program(CALLS)
    assert program.stdout.readline() == "called\n"
    with pytest.raises(EngineError, match="it computes"):
        park(pair)
    assert go_on(program) == "[2.0, 4.0, 6.0]"
    with pytest.raises(EngineError, match="a JAX program of a process calls functions of that process"):
        pair.move()
    park(pair)
    program.stdin.write("\n")
    program.stdin.flush()
    wake(pair, eventually, "GPU-2")
    assert program.stdout.readline() == "called\n"
    assert go_on(program) == "[4.0, 6.0, 8.0]"


FREED = """
import gc, sys, jax, jax.numpy as jnp
def told(x):
    @jax.jit
    def f(x):
        jax.debug.callback(lambda y: print("told", y, flush=True), x)
        return x + 1
    x = f(x)
    jax.effects_barrier()
    return x
def freed():
    jax.clear_caches()
    gc.collect()
    print("freed", flush=True)
    sys.stdin.readline()
x = told(jnp.arange(2.0))
freed()
x = told(x + 1)
freed()
print(x.tolist(), flush=True)
"""


def test_a_lease_moves_once_the_programs_that_called_functions_are_freed(
    start_program: Callable[..., Any], pair: Pair, eventually: Callable[..., Any]
) -> None:
    def moves() -> bool:
        try:
            at_rest(pair.move)
        except EngineError as e:
            assert "a JAX program of a process calls functions" in str(e)
            return False
        return True

    program = start_program(FREED)
    assert program.stdout.readline() == "told [0. 1.]\n"
    assert program.stdout.readline() == "freed\n"
    eventually(moves, "nothing calls functions any more")
    assert go_on(program) == "told [2. 3.]", "and a program calls them at the other server"
    assert program.stdout.readline() == "freed\n"
    assert go_on(program) == "[3.0, 4.0]"


ENDLESS = """
import sys, jax, jax.numpy as jnp
x = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 2, lambda x: jnp.sin(x @ x), x))(jnp.zeros((300, 300)))
print("begun", flush=True)
sys.stdin.readline()
"""


def test_a_lease_is_busy_while_its_program_runs_for_which_nobody_waits(
    start_program: Callable[..., Any], pair: Pair, eventually: Callable[..., Any]
) -> None:
    def busy() -> list[float]:
        usage = pair.here.engine.usage().get(pair.lease.id)
        return list(usage.busy.values()) if usage is not None else []

    program = start_program(ENDLESS)
    assert program.stdout.readline() == "begun\n"
    eventually(lambda: any(busy()), "the time counts while it passes")
    with pytest.raises(EngineError, match="it computes"):
        park(pair)
    eventually(lambda: any(busy()), "and goes on to count")
