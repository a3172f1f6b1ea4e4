"""Trains with the library that is named, on the leased slice and on the CPU; prints whether the bits are the same."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

X = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)


def flax():
    import optax
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.last = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    losses = [step(model, optimizer, X, Y) for _ in range(20)]
    model.eval()
    return losses, model(X), nnx.to_pure_dict(nnx.state(model, nnx.Param))


def optax():
    import optax

    def loss(parameters, x, y):
        return jnp.mean((jnp.tanh(x @ parameters["w"]) @ parameters["v"] - y) ** 2)

    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 30)
    chained = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(schedule))
    transform = optax.MultiSteps(chained, every_k_schedule=2)

    @jax.jit
    def step(parameters, state):
        value, gradients = jax.value_and_grad(loss)(parameters, X, Y)
        updates, state = transform.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    keys = jax.random.split(jax.random.key(1))
    parameters = {"w": jax.random.normal(keys[0], (8, 16)), "v": jax.random.normal(keys[1], (16,))}
    state, losses = transform.init(parameters), []
    for _ in range(30):
        parameters, state, value = step(parameters, state)
        losses.append(value)
    return losses, parameters


def equinox():
    import equinox as eqx
    import optax

    class Model(eqx.Module):
        cell: eqx.nn.GRUCell
        last: eqx.nn.Linear

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.cell = eqx.nn.GRUCell(2, 8, key=first)
            self.last = eqx.nn.Linear(8, 1, key=second)

        def __call__(self, series):
            state, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(8), series)
            return self.last(eqx.error_if(state, jnp.isnan(state).any(), "not a number"))[0]

    @eqx.filter_jit
    def step(model, state, x, y):
        def loss(model):
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)

        value, gradients = eqx.filter_value_and_grad(loss)(model)
        updates, state = transform.update(gradients, state, model)
        return eqx.apply_updates(model, updates), state, value

    model = Model(jax.random.key(2))
    transform = optax.adam(1e-2)
    state, losses = transform.init(eqx.filter(model, eqx.is_array)), []
    for _ in range(10):
        model, state, value = step(model, state, X.reshape(64, 4, 2), Y)
        losses.append(value)
    try:
        model(jnp.full((4, 2), jnp.nan))
        raise AssertionError("it was not a number")
    except RuntimeError as e:
        assert "not a number" in str(e), e
    return losses, eqx.filter(model, eqx.is_array)


def numpyro():
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(8), 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    chains = MCMC(NUTS(model), num_warmup=30, num_samples=20, progress_bar=False)
    chains.run(jax.random.key(3), X, Y)
    return chains.get_samples()


def bits(tree):
    return [(a.dtype.str, a.shape, a.tobytes()) for a in map(np.asarray, jax.tree.leaves(tree))]


train = globals()[sys.argv[1]]
(slice,) = jax.devices()
assert "emulated" in slice.device_kind, slice
ours = train()
on = {device for leaf in jax.tree.leaves(ours) for device in leaf.devices()}
with jax.default_device(jax.devices("cpu")[0]):
    theirs = train()
print(json.dumps([on == {slice}, sum(len(a[2]) for a in bits(ours)), bits(ours) == bits(theirs)]))
