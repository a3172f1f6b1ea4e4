"""Computes on the leased slice and on the CPU, and prints for each case whether the results are the same bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def compiled(function):
    """A case that is one program, and not one for each operation."""
    return case(jax.jit(function))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@case
def training_with_donation():
    def loss(parameters, x, y):
        for w, b in parameters[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = parameters[-1]
        return jnp.mean((x @ w + b - y) ** 2)

    def step(parameters, x, y):
        value, grads = jax.value_and_grad(loss)(parameters, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, grads), value

    step = jax.jit(step, donate_argnums=0)
    sizes = [(8, 32), (32, 32), (32, 1)]
    parameters = [(normal(k, *size) * 0.1, jnp.zeros(size[1])) for k, size in enumerate(sizes)]
    x = normal(9, 64, 8)
    y = jnp.sin(x.sum(1, keepdims=True))
    for _ in range(50):
        parameters, value = step(parameters, x, y)
    return parameters, value


@compiled
def products():
    return normal(1, 100, 70) @ normal(2, 70, 50), jnp.einsum("ij,kj->ik", normal(3, 7, 5), normal(4, 9, 5))


@compiled
def random_numbers():
    key = jax.random.key(3)
    return (
        jax.random.randint(key, (100,), 0, 50),
        jax.random.permutation(key, 100),
        jax.random.key_data(jax.random.split(key, 4)),
    )


@compiled
def derivatives():
    f = jax.checkpoint(lambda x: jnp.sum(jnp.sin(x) ** 3))
    x = jnp.linspace(0, 1, 17)
    return jax.grad(f)(x), jax.jvp(f, (x,), (x,))


@compiled
def control_flow():
    return (
        jax.lax.scan(lambda c, x: (c * 0.9 + x, c), 0.0, jnp.arange(20.0)),
        jax.lax.while_loop(lambda v: v[0] < 10, lambda v: (v[0] + 1, v[1] * 1.5), (0, 1.0)),
        jax.lax.cond(jnp.float32(1) > 0, lambda: jnp.ones(3), lambda: jnp.zeros(3)),
        jax.vmap(lambda a, b: a @ b)(normal(4, 4, 2, 3), normal(5, 4, 3)),
    )


@compiled
def convolution_fft_sorting():
    return (
        jax.lax.conv(normal(4, 2, 3, 16, 16), normal(5, 4, 3, 3, 3), (1, 1), "SAME"),
        jnp.fft.fft(jnp.arange(32.0)),
        jnp.sort(normal(6, 100)),
        jax.lax.top_k(normal(6, 100), 5),
    )


@compiled
def linear_algebra():
    a = jnp.eye(6) * 9 + normal(7, 6, 6) * 0.1
    s = a + a.T
    return (
        jnp.linalg.cholesky(s),
        jnp.linalg.qr(a),
        jnp.linalg.svd(a),
        jnp.linalg.eigh(s),
        jnp.linalg.solve(a, jnp.arange(6.0)),
    )


@case
def lapack():
    found = []
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        for dtype in ("float32", "float64", "complex64", "complex128"):
            found.append(
                jax.jit(lapack_functions)(normal(8, 3, 5, 4).astype(dtype), normal(9, 3, 4, 4).astype(dtype))
            )
    return found


def lapack_functions(a, square):
    n = square.shape[-1]
    s = square @ square.mT.conj() + jnp.eye(n, dtype=square.dtype)
    band = jnp.ones(square.shape[:-1], square.dtype)
    return (
        [jnp.linalg.svd(x, full_matrices=full) for x in (a, a.mT) for full in (False, True)],
        [jnp.linalg.svd(x, compute_uv=False) for x in (a, a.mT)],
        jax.lax.linalg.svd(a, algorithm=jax.lax.linalg.SvdAlgorithm.QR),
        [jnp.linalg.qr(x, mode=mode) for x in (a, a.mT) for mode in ("reduced", "complete", "raw")],
        jax.lax.linalg.qr(a, pivoting=True, full_matrices=False),
        [jax.lax.linalg.lu(x) for x in (a, a.mT)],
        jnp.linalg.cholesky(s),
        jnp.linalg.eigh(s),
        jax.lax.linalg.eig(square),
        jax.lax.linalg.schur(square),
        jax.lax.linalg.hessenberg(square),
        jax.lax.linalg.tridiagonal(s),
        jax.lax.linalg.tridiagonal_solve(band, 4 * band, band, square),
        jax.lax.linalg.triangular_solve(s, square, left_side=True, lower=True),
        jax.lax.linalg.triangular_solve(s, a, left_side=False, transpose_a=True, conjugate_a=True),
    )


@case
def types():
    names = "bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32 complex64 float8_e4m3fn float8_e5m2"
    return [jnp.arange(7).astype(name) for name in names.split()], jnp.arange(7, dtype=jnp.bfloat16) * 1.1


@case
def wide_types():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        return [jnp.arange(7).astype(name) * 3 for name in ("int64", "uint64", "float64", "complex128")]


@case
def arrays_from_the_host():
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    return [
        jnp.asarray(numbers[::2, ::-2]) + 1,
        jnp.asarray(np.asfortranarray(numbers)) * 2,
        jnp.asarray(np.zeros((0, 3), np.float32)) + 1,
        jnp.asarray(np.float32(3)) + 1,
        jnp.asarray(np.arange(300_000, dtype=np.int32)) + 1,
    ]


@case
def kept_although_donated():
    f = jax.jit(lambda x, y: (x + 1, y), donate_argnums=0)
    x = jnp.ones(5)
    return f(x, jnp.zeros(5)), x.is_deleted()


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def main():
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    found = {}
    for name, function in CASES.items():
        ours = jax.tree.leaves(function())
        with jax.default_device(cpu):
            theirs = jax.tree.leaves(function())
        there = all(x.devices() == {device} for x in ours if isinstance(x, jax.Array))
        found[name] = there and len(ours) == len(theirs) and all(map(same, ours, theirs))
    print(json.dumps(found))


main()
