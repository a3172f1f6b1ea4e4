"""What happens to a JAX program when something ends, fails or does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jupyter_gpupool.transport import frames, handshake

from ..support.cutting_proxy import CuttingProxy

#: A worker may start slowly on a busy machine, in seconds.
PATIENCE_S = 300.0

KILLED = """
import jax, jax.numpy as jnp, numpy as np, os, signal, sys
f = jax.jit(lambda x: x @ x)
x = f(jnp.ones((50, 50))).block_until_ready()
os.kill(int(sys.argv[1]), signal.SIGKILL)
for _ in range(2):
    try:
        f(x).block_until_ready()
    except jax.errors.JaxRuntimeError as e:
        print(e)
print((jax.device_put(np.ones(2), jax.devices("cpu")[0]) + 1).tolist())
"""


def test_a_killed_worker_is_an_exception_and_the_program_goes_on(
    run_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    worker = start_worker()
    done = run_program(KILLED, worker, str(worker.process.pid))
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert len(errors) == 2 and all(
        line.startswith("UNAVAILABLE: the session with the worker") for line in errors
    )
    assert last == "[2.0, 2.0]"


MEMORY = """
import jax, jax.numpy as jnp, torch
x = jnp.ones((1000, 1000)).block_until_ready()
def message(call):
    try:
        call()
    except (jax.errors.JaxRuntimeError, torch.OutOfMemoryError) as e:
        return f"{type(e).__name__}: {str(e).splitlines()[0]}"
print(message(lambda: jnp.ones((20000, 2000)).block_until_ready()))
print(message(lambda: (jnp.ones((20000, 2000)) + 1).sum().tolist()))
y = torch.ones(90 << 18, device="cuda")
print(message(lambda: jnp.ones((3000, 1000)).block_until_ready()))
print(message(lambda: torch.ones(3 << 20, device="cuda").sum().item()))
del y
torch.cuda.synchronize()
print(jnp.ones((20000, 1000)).sum().tolist(), x.sum().tolist())
"""


def test_pytorch_and_jax_share_the_slices_memory(
    run_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    done = run_program(MEMORY, start_worker(memory_mib=100))
    assert done.returncode == 0, done.stderr
    one, two, three, four, last = done.stdout.splitlines()
    refused = "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 160000000 bytes on slice 0"
    assert one.startswith(refused) and two.startswith(refused) and "which has 104857600 bytes" in one
    assert three.startswith("JaxRuntimeError: RESOURCE_EXHAUSTED") and four.startswith(
        "OutOfMemoryError: CUDA"
    )
    assert last == "20000000.0 1000000.0"


LINES = """
import jax, jax.numpy as jnp, numpy as np
large = jax.jit(lambda: jnp.ones((20000, 2000)))
def train():
    x = large()  # does not fit
    return x + 1
def message(call):
    try:
        call()
    except jax.errors.JaxRuntimeError as e:
        return str(e)
y = train()
print(message(lambda: (y * 2).sum().tolist()))
x = jax.device_put(np.ones((10000, 2000)))
z = jax.device_put(np.ones((10000, 2000)))  # nor does this
print(message(lambda: np.asarray(z + 1)))
print(message(lambda: (jnp.ones(()) + y).block_until_ready()))
print(message(lambda: jax.device_put(np.ones((20000, 2000)))))
print((jnp.ones(2) + 1).tolist())
"""


def test_an_error_names_the_line_that_called_what_failed(
    run_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    done = run_program(LINES, start_worker(memory_mib=100))
    assert done.returncode == 0, done.stderr
    one, two, three, larger_than_all = done.stdout.split("RESOURCE_EXHAUSTED")[1:]
    for said in (one, three):
        assert "(raised by what was called at\n" in said
        assert "line 5, in train\n    x = large()  # does not fit)" in said
    assert "line 15, in <module>\n    z = jax.device_put(np.ones((10000, 2000)))  # nor does this)" in two
    assert "160000000 bytes on slice 0, which has 104857600" in larger_than_all
    assert larger_than_all.endswith("[2.0, 2.0]\n"), "the session goes on"


OPTION = """
import jax
try:
    jax.jit(lambda x: x + 1, compiler_options={"no_such_effort": 0.5})(1.0)
except jax.errors.JaxRuntimeError as e:
    print(e)
"""


def test_an_option_that_there_is_not_is_an_error(run_program: Callable[..., Any], worker: Any) -> None:
    done = run_program(OPTION, worker)
    assert done.stdout == "INVALID_ARGUMENT: No such compile option: 'no_such_effort'\n", done.stderr


EXCEPTIONS = """
import jax, jax.numpy as jnp, sys
def fail():
    arrays = [jnp.ones(3) * k for k in range(20)]
    return [x + "a" for x in arrays]
for _ in range(20):
    try:
        fail()
    except TypeError:
        pass
x = jnp.ones(3)
f = jax.jit(lambda x: x + 1, donate_argnums=0)
f(x)
try:
    x + 1
except RuntimeError as e:
    print(e)
arrays = [jnp.ones(3) for _ in range(50)]
unfinished = jax.jit(lambda x: x @ x)(jnp.ones((1000, 1000)))
sys.exit(7)
"""


def test_exceptions_destroy_arrays_and_the_exit_code_is_the_programs(
    run_program: Callable[..., Any], worker: Any
) -> None:
    done = run_program(EXCEPTIONS, worker)
    assert done.returncode == 7, done.stderr
    assert "deleted" in done.stdout


FORK = """
import atexit, os
def late():
    try:
        x + 1
    except jax.errors.JaxRuntimeError as e:
        print(e, flush=True)
atexit.register(late)
import jax, jax.numpy as jnp
x = jnp.ones(3).block_until_ready()
if os.fork() == 0:
    try:
        x.tolist()
    except jax.errors.JaxRuntimeError as e:
        print(e, flush=True)
    os._exit(0)
os.wait()
print(x.tolist(), flush=True)
"""


def test_a_fork_is_refused_and_the_parent_goes_on_until_its_end(
    run_program: Callable[..., Any], worker: Any
) -> None:
    done = run_program(FORK, worker)
    assert done.returncode == 0, done.stderr
    child, parent, late = done.stdout.splitlines()
    assert child.startswith("UNAVAILABLE: JAX does not work in a forked process")
    assert parent == "[1.0, 1.0, 1.0]"
    assert late == "UNAVAILABLE: the process ends, and its session with the worker has ended"


CUT = """
import jax, jax.numpy as jnp
step = jax.jit(lambda x: x + 1)
x = jnp.zeros(4)
for k in range(300):
    x = step(x)
    if k % 10 == 0:
        assert x.tolist() == [k + 1.0] * 4
print(x.tolist())
"""


def test_a_session_survives_cut_connections(run_program: Callable[..., Any], worker: Any) -> None:
    with CuttingProxy(("127.0.0.1", worker.spec.port), cuts=3, mean_bytes=2000) as proxy:
        done = run_program(CUT, worker, port=proxy.port)
    assert done.stdout == "[300.0, 300.0, 300.0, 300.0]\n", done.stderr
    assert not proxy.cuts_left and proxy.connections >= 4


UPLOADS = """
import jax, numpy as np
add = jax.jit(lambda x: x + 1, donate_argnums=0)
# Copied at once, into one buffer of many, and longer than those.
for count, times in ((3, 20), (100_000, 80), (4_000_000, 3)):
    host, sent = np.arange(count, dtype=np.float32), []
    for k in range(times):
        sent.append(jax.device_put(host))
        host += 1
    for k, there in enumerate(sent):
        wanted = np.arange(count, dtype=np.float32) + k
        assert np.array_equal(there, wanted) and np.array_equal(add(there), wanted + 1), (count, k)
    assert host[0] == times
    table = np.arange(count, dtype=np.float32).reshape(-1, 1).repeat(2, 1)
    assert np.array_equal(jax.device_put(table.T), table.T), count
print("the same")
"""


def test_a_program_may_change_what_it_has_sent_though_it_is_sent_again(
    run_program: Callable[..., Any], worker: Any
) -> None:
    with CuttingProxy(("127.0.0.1", worker.spec.port), cuts=12, mean_bytes=3_000_000) as proxy:
        done = run_program(UPLOADS, worker, port=proxy.port)
    assert done.stdout == "the same\n", done.stderr
    assert proxy.connections >= 8


WITHOUT = """
import jax, sys, warnings
warnings.simplefilter("error")
print(jax.devices(), "jupyter_gpupool.jax.client.registration" in sys.modules, "torch" in sys.modules)
"""


def test_without_a_lease_nothing_happens(run_program: Callable[..., Any]) -> None:
    done = run_program(WITHOUT, None)
    assert done.stdout == "[CpuDevice(id=0)] False False\n", done.stderr


DEVICES = """
import jax
print(jax.devices(), (jax.numpy.arange(3) + 1).tolist())
"""


def test_a_lease_that_spans_servers_is_refused_in_one_line_but_for_the_slices_of_one(
    prepare_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    spec = start_worker(num_gpus=2).spec
    here = (spec.host, spec.port)
    elsewhere = replace(spec.devices[1], index=2, uuid="GPU-elsewhere")
    spread = replace(spec, devices=(*spec.devices, elsewhere), addresses=(here, here, ("127.0.0.2", 9)))
    done = prepare_program(DEVICES, spread).run()
    assert done.stdout == "[CpuDevice(id=0)] [1, 2, 3]\n", done.stderr
    said = [line for line in done.stderr.splitlines() if "NotRegistered" in line]
    assert len(said) == 1 and "spans several GPU servers" in said[0]
    done = prepare_program(DEVICES, spread, CUDA_VISIBLE_DEVICES="1,0").run()
    assert done.stdout == "[CudaDevice(id=0), CudaDevice(id=1)] [1, 2, 3]\n", done.stderr


MISSING = """
from pathlib import Path
from jupyter_gpupool.jax.client import native
native.LIBRARY = Path("not built")
import jax
print(jax.devices())
"""


@pytest.mark.parametrize("library", ["not built", "libm.so.6"], ids=["missing", "of another version"])
def test_without_the_c_part_jax_says_so_in_one_line(
    run_program: Callable[..., Any], worker: Any, library: str
) -> None:
    done = run_program(MISSING.replace("not built", library), worker)
    assert done.stdout == "[CpuDevice(id=0)]\n", done.stderr
    said = [line for line in done.stderr.splitlines() if "NotRegistered" in line]
    assert len(said) == 1 and "lacks the plugin's compiled part" in said[0]


@pytest.mark.parametrize(
    "header",
    [None, 7, [], [99, []], [1, [], 1], [2, [], 1, [5], 9, []], [3, 4], [2, [], "a", [], 1, []], [6, ["x"]]],
    ids=repr,
)
def test_what_is_no_command_ends_the_session_and_not_the_worker(worker: Any, header: Any) -> None:
    hello = {"framework": "jax", "jax": "0.0", "session": os.urandom(16).hex(), "generation": 1}
    connection, _ = handshake.connect(
        worker.spec, "session", {**hello, "received": 0, "new": True}, PATIENCE_S
    )
    with connection:
        frames.send(connection, frames.Kind.RECORDS, header)
        kind, said, _ = frames.receive(connection)
        while kind is frames.Kind.VALUE or kind is frames.Kind.ACK:
            kind, said, _ = frames.receive(connection)
        assert kind is frames.Kind.BYE and "something invalid" in said["message"]
    assert worker.process.is_alive()


def test_another_framework_is_refused(worker: Any) -> None:
    hello = {
        "framework": "numpy",
        "session": os.urandom(16).hex(),
        "generation": 1,
        "received": 0,
        "new": True,
    }
    connection, _ = handshake.connect(worker.spec, "session", hello, PATIENCE_S)
    with connection:
        kind, said, _ = frames.receive(connection)
    assert (kind, said["message"]) == (frames.Kind.BYE, "this worker serves PyTorch only")
