"""JAX programs on a slice compute what they compute on the CPU, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def test_results_are_those_of_the_cpu_to_the_bit(run_program: Callable[..., Any], worker: Any) -> None:
    done = run_program("results.py", worker)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 12 and [name for name, same in found.items() if not same] == []


NAMES = """
import jax, jax.numpy as jnp, pickle
(device,) = jax.devices()
assert jax.devices("cuda") == jax.devices("gpu") == [device] != jax.devices("cpu")
assert jax.local_device_count() == 1 and str(device) == "CudaDevice(id=0)" and "emulated" in device.device_kind
x = jax.device_put(jnp.arange(3.0), jax.devices("cpu")[0])
assert jax.device_put(x, device).devices() == {device}
compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
assert compiled.as_text().startswith("HloModule") and compiled.memory_analysis().argument_size_in_bytes == 256
assert pickle.loads(pickle.dumps(jnp.arange(3))).tolist() == [0, 1, 2]
big = jnp.ones((1000, 1000)).block_until_ready()
assert 4_000_000 <= device.memory_stats()["bytes_in_use"] < 4_100_000
assert device.memory_stats()["bytes_limit"] == 26008 << 20
print("good")
"""


def test_the_slice_is_a_cuda_device(run_program: Callable[..., Any], worker: Any) -> None:
    done = run_program(NAMES, worker, JAX_PLATFORMS="cuda,cpu")
    assert done.stdout == "good\n", done.stderr


SEVERAL = """
import jax, jax.numpy as jnp
one, two = jax.devices()
x = jax.device_put(jnp.arange(4.0), two)
assert jax.jit(lambda v: v * 2)(x).devices() == {two}
y = jax.device_put(x + 1, one)
assert y.devices() == {one} and (y + y).tolist() == [2.0, 4.0, 6.0, 8.0]
print("good")
"""


def test_programs_use_one_of_several_slices_or_all(
    run_program: Callable[..., Any], start_worker: Callable[..., Any]
) -> None:
    worker = start_worker(2)
    done = run_program(SEVERAL, worker)
    assert done.stdout == "good\n", done.stderr
    done = run_program("meshes.py", worker)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8 and [name for name, same in found.items() if not same] == []
    shown = run_program("import jax; print(jax.devices())", worker, CUDA_VISIBLE_DEVICES="1")
    assert shown.stdout == "[CudaDevice(id=0)]\n", shown.stderr


THREADS = """
import gc, jax, jax.numpy as jnp, threading
from jupyter_gpupool.jax.client import registration
step = jax.jit(lambda x: x + 1)
found = []
def work(start):
    y = jnp.full(8, float(start))
    for _ in range(400):
        y = step(y)
    found.append((start, y.tolist()))
threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert sorted(found) == [(k, [k + 400.0] * 8) for k in range(8)]
(stats,) = (d.memory_stats() for d in jax.devices())
programs = registration._plugin.programs
before = len(programs)
del step
jax.clear_caches()
gc.collect()
jax.devices()[0].memory_stats()
print(stats["bytes_in_use"], before >= 2, len(programs))
"""


def test_eight_threads_compute_at_once_and_leave_nothing(
    run_program: Callable[..., Any], worker: Any
) -> None:
    done = run_program(THREADS, worker)
    assert done.stdout == "0 True 0\n", done.stderr
