"""Computes on two leased slices and on two devices of the CPU; prints for each case whether the bits are the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 2)

CASES = {}
X = np.arange(32, dtype=np.float32).reshape(8, 4) / 7


def case(function):
    CASES[function.__name__] = function
    return function


def split(devices, array=X, *spec):
    return jax.device_put(
        array, NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec(*spec or ("x",)))
    )


@case
def mapped(devices):
    f = jax.pmap(
        lambda x: (jax.lax.psum(x, "i"), x * 2, jax.lax.axis_index("i")), axis_name="i", devices=devices
    )
    return f(X.reshape(2, 4, 4))


@case
def partitioned(devices):
    x = split(devices)
    f = jax.jit(lambda x, w: (jnp.tanh(x @ w).sum(), x.T @ x, x[::-1]))
    return f(x, split(devices, np.ones((4, 4), np.float32), None))


@case
def sharding_of_results(devices):
    everywhere = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    whole = jax.jit(lambda x: x + 1, out_shardings=everywhere)(split(devices))
    assert whole.sharding == everywhere and all(s.data.shape == X.shape for s in whole.addressable_shards)
    parts = split(devices)
    assert [s.data.shape for s in parts.addressable_shards] == [(4, 4)] * 2
    return whole, [s.data for s in parts.addressable_shards]


@case
def collectives(devices):
    def body(x):
        return (
            jax.lax.all_gather(x, "x"),
            jax.lax.psum(x, "x"),
            jax.lax.pmax(x, "x"),
            jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]),
            jax.lax.all_to_all(x, "x", 1, 0, tiled=True),
            jax.lax.psum_scatter(x, "x", tiled=True),
        )

    mesh = Mesh(np.array(devices), ("x",))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")))(
        X
    )


@case
def training_on_parts_of_the_data(devices):
    def loss(w, x):
        return jnp.mean((jnp.sin(x @ w) - x) ** 2)

    step = jax.jit(lambda w, x: (w - 0.1 * jax.grad(loss)(w, x), loss(w, x)), donate_argnums=0)
    w, x = split(devices, np.eye(4, dtype=np.float32), None), split(devices)
    for _ in range(10):
        before = w
        w, value = step(w, x)
        assert before.is_deleted()
    return w, value


@case
def copies(devices):
    x = split(devices)
    one = jax.device_put(x, devices[1])
    return one + 1, jax.device_put(one, x.sharding), split(devices[::-1]) * 2


@case
def random_numbers(devices):
    s = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
    return jax.jit(lambda: jax.random.normal(jax.random.key(1), (8, 4)), out_shardings=s)()


@case
def errors(devices):
    mesh = Mesh(np.array(devices), ("x",))
    big = NamedSharding(mesh, PartitionSpec("x"))
    try:
        jax.jit(lambda: jnp.ones((2, 1 << 45), np.int8), out_shardings=big)().block_until_ready()
    except jax.errors.JaxRuntimeError as e:
        return str(e).startswith("RESOURCE_EXHAUSTED")
    return False


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def main():
    found = {}
    for name, function in CASES.items():
        ours = jax.tree.leaves(function(jax.devices()))
        theirs = [True] if name == "errors" else jax.tree.leaves(function(jax.devices("cpu")))
        found[name] = len(ours) == len(theirs) and all(map(same, ours, theirs))
    assert all(d.memory_stats()["bytes_in_use"] < 10_000 for d in jax.devices())
    print(json.dumps(found))


main()
