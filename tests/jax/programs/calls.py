"""Calls functions of this process from programs on the leased slice and on the CPU; prints what differs."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np

X = jnp.arange(6.0).reshape(2, 3)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@case
def results():
    f = jax.jit(
        lambda x: jax.pure_callback(
            lambda a: (a.T @ a, a.astype(np.int8)),
            (shape(X.T @ X), jax.ShapeDtypeStruct(x.shape, np.int8)),
            x,
        )
    )
    return f(X), f(X + 1)


@case
def results_that_are_not_contiguous():
    return jax.jit(lambda x: jax.pure_callback(lambda a: a[::-1].T, shape(X.T), x) * 2)(X)


@case
def a_vectorized_function_of_each_element():
    return jax.vmap(lambda x: jax.pure_callback(np.sin, shape(x), x, vmap_method="expand_dims"))(X)


@case
def types():
    names = ("bool", "int16", "uint8", "bfloat16", "float16", "complex64", "float8_e4m3fn")
    arrays = [X.astype(name) for name in names] + [jnp.zeros((0, 3)), jnp.float32(2)]
    same = lambda *a: a  # noqa: E731
    return jax.jit(lambda *a: jax.pure_callback(same, tuple(map(shape, a)), *a))(*arrays)


@case
def effects_in_their_order():
    seen = []

    def note(x):
        seen.append(x.tolist())
        return np.int32(len(seen))

    def body(carry, x):
        return carry, jax.experimental.io_callback(note, jax.ShapeDtypeStruct((), np.int32), x, ordered=True)

    f = jax.jit(lambda x: jax.lax.scan(body, 0, x))
    counts = f(jnp.arange(5)), f(jnp.arange(5, 8))
    jax.effects_barrier()
    return counts, np.array(seen)


@case
def effects_without_results():
    seen = set()
    f = jax.jit(
        lambda x: jax.lax.fori_loop(
            0, 20, lambda i, v: (jax.debug.callback(lambda a: seen.add(int(a)), i), v + i)[1], x
        )
    )
    del_after = f(0)
    jax.debug.callback(lambda a: seen.add(a.item()), 7)
    jax.effects_barrier()
    return del_after, np.array(sorted(map(int, seen)))


@case
def a_function_whose_program_is_gone():
    seen = []
    jax.jit(lambda x: jax.debug.callback(lambda a: seen.append(a.item()), x))(3)
    jax.clear_caches()
    jax.effects_barrier()
    return np.array(seen)


@case
def an_exception():
    def fail(a):
        raise ValueError(f"no such number: {a.max()}")

    f = jax.jit(lambda x: jax.pure_callback(fail, shape(x), x) + 1)
    with_names = []
    for call in (lambda: f(X).block_until_ready(), lambda: f(X).tolist()):
        try:
            call()
        except jax.errors.JaxRuntimeError as e:
            text = str(e)
            first = text.splitlines()[0]
            with_names.append((first.partition("Traceback")[0], "ValueError: no such number: 5.0" in text))
            assert "in fail" in text and "worker" not in text
    return [np.array([flag for _, flag in with_names])]


@case
def several_threads():
    f = jax.jit(lambda x: jax.pure_callback(lambda a: a * 2, shape(x), x))
    found = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: f(jnp.full(4, k)).tolist()})) for k in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return [np.array(found[k]) for k in range(4)]


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def main():
    cpu = jax.devices("cpu")[0]
    for name, function in CASES.items():
        ours = jax.tree.leaves(function())
        with jax.default_device(cpu):
            theirs = jax.tree.leaves(function())
        if not (ours and len(ours) == len(theirs) and all(map(same, ours, theirs))):
            print(name, ours, theirs)
    jax.jit(functools.partial(jax.debug.print, "printed {x}"))(x=X[0])
    jax.effects_barrier()
    on_slice = jnp.ones(3)
    try:
        jax.jit(lambda x: jax.pure_callback(lambda a: np.asarray(on_slice + a), shape(x), x))(X[0]).tolist()
    except jax.errors.JaxRuntimeError as e:
        print(str(e).count("cannot wait for arrays of a slice"))
    print(jax.devices()[0].memory_stats()["bytes_in_use"])


main()
